"""The copy of a save beside the GPU's work: the values of the moment, though the weights change right behind it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.written_parts import make_state
from trainer.checkpoint import load_ranges
from trainer.fragments import Fragment
from trainer.manifest import commit
from trainer.protocol import PartReport
from trainer.saver import CheckpointSaver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUMEL = 32 << 20
NAMES = [f"blocks.{index}.up.weight" for index in range(8)]


def test_an_update_behind_the_fence_does_not_reach_the_copy(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    live = [
        Fragment(name, "master", 0, NUMEL, torch.full((NUMEL,), float(index), device=device))
        for index, name in enumerate(NAMES)
    ]
    reports: list[PartReport] = []
    saver = CheckpointSaver(str(tmp_path), 1, 0, device, reports.append)
    saver.reserve(NUMEL * len(NAMES))
    state = make_state({name: (NUMEL,) for name in NAMES}, 1, kinds=("master",))
    for step in (1, 2):
        saver.save(step, live, None)
        saver.fence()
        for fragment in live:
            fragment.data.add_(1.0)
    saver.wait()
    saver.close()
    assert [report.step for report in reports] == [1, 2]
    assert all(0 < report.write_s < report.total_s for report in reports)
    (first, second) = reports
    assert first.write_s < 1.0
    found = commit(str(tmp_path), 1, 1, [first.receipt], state)
    for fragment in load_ranges(str(tmp_path), found, [one.range for one in live]):
        assert (fragment.data == float(NAMES.index(fragment.name))).all()
    found = commit(str(tmp_path), 2, 1, [second.receipt], replace(state, step=2))
    for fragment in load_ranges(str(tmp_path), found, [one.range for one in live]):
        assert (fragment.data == float(NAMES.index(fragment.name)) + 1.0).all()
