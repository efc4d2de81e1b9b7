"""A data worker of a real run that serves wrong tokens under the right row id, with a checksum that fits them.

No rank can see that: the lie is consistent. The worker processes are made to lie from outside, by a module that Python
loads at their start; the product has no switch for it.
"""

import os
from pathlib import Path

import pytest

from tests.helpers.runs import running, write_run

LIE_FROM = 31
"""The first training step that is fed wrong tokens."""

SITECUSTOMIZE = f"""
import importlib.abc, importlib.util, sys
from dataclasses import replace


class Liar(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "data_service.rows" or not sys.argv[0].endswith("default_worker.py"):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            spoil(module)

        spec.loader.exec_module = exec_module
        return spec


def spoil(module):
    from data_service.hashing import row_crcs
    from data_service.order import rows_of_batch

    reader = module.ShardRows
    honest = reader.read

    def read(self, plan, row_ids):
        block = honest(self, plan, row_ids)
        if plan.split == "train":
            wrong = rows_of_batch(plan, {LIE_FROM - 1}, 2, 3)[0]
            tokens = block.tokens.copy()
            tokens[block.row_id == wrong, 1] ^= 1
            crcs = row_crcs(tokens, block.length, block.starts, block.start_offsets)
            block = replace(block, tokens=tokens, row_crc=crcs)
        return block

    reader.read = read


sys.meta_path.insert(0, Liar())
"""


@pytest.mark.timeout(200)
def test_a_consistent_lie_fails_the_run_and_no_checkpoint_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    train = (
        "  parallel: {dp: 2, pp: 1}\n  steps: 200\n  eval: {every: 1000, max_batches: 2}\n  checkpoint: {every: 10}\n"
    )
    file = write_run(tmp_path, train=train)
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    with running("train", file, env={"PYTHONPATH": path}) as run:
        assert run.wait() == 1, run.output[-4000:]
        ended = run.events("run_ended")[-1]
        committed = [event["step"] for event in run.events("checkpoint_committed")]
    # a row of step 31 may be read again in a later epoch, never in an earlier step
    assert f"step {LIE_FROM}: the rows that the ranks consumed hash to" in ended["error"]
    # saves are written while training goes on: that of step 30 may still be in flight when the run fails
    assert committed in ([10, 20], [10, 20, 30])
    assert "Traceback" not in run.output
