"""The hash is of what the ranks were given, not of what they asked for."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from data_service.audit import SampleAudit
from data_service.errors import DeliveryError
from data_service.hashing import row_crcs
from data_service.order import rows_of_batch
from data_service.plan import Plan
from data_service.planning import make_plan
from data_service.rows import ShardRows
from data_service.schema import RowBlock
from tests.helpers.ranks import RanksFailedError, specs_of
from tests.helpers.row_service import row_service
from tests.ranks.conftest import GLOBAL_BATCH, SEED, SEQ_LEN, STEPS, Case, Lab

WRONG_STEP = 5


def _wrong(plan: Plan) -> np.uint64:
    """The row in slot 3 of step 5."""
    row: np.uint64 = rows_of_batch(plan, WRONG_STEP - 1, 3, 4)[0]
    return row


class _WrongTokens(ShardRows):
    """Serves one token of one row of step 5 wrong, with a checksum that fits it."""

    def read(self, plan: Plan, row_ids: npt.NDArray[np.uint64]) -> RowBlock:
        block = super().read(plan, row_ids)
        if plan.split == "train":
            tokens = block.tokens.copy()
            tokens[block.row_id == _wrong(plan), 1] ^= 1
            crcs = row_crcs(tokens, block.length, block.starts, block.start_offsets)
            block = replace(block, tokens=tokens, row_crc=crcs)
        return block


class _WrongRow(ShardRows):
    """Serves another row in place of one row of step 5."""

    def read(self, plan: Plan, row_ids: npt.NDArray[np.uint64]) -> RowBlock:
        wanted = row_ids.copy()
        if plan.split == "train":
            wrong = _wrong(plan)
            wanted[wanted == wrong] = (wrong + np.uint64(1)) % np.uint64(plan.num_rows)
        return super().read(plan, wanted)


def test_wrong_tokens_change_the_hash_of_their_step_and_the_audit_finds_it(lab: Lab) -> None:
    """The lie is consistent, so no rank can see it; who reads the dataset itself can."""
    expected = lab.reference(Case(1, 1)).steps
    with row_service(lab.folder, SEQ_LEN, GLOBAL_BATCH, SEED, sources=(_WrongTokens,)) as service:
        spec = replace(lab.spec(Case(1, 1), lab.folder / "wrong-tokens"), data=service.access)
        found = lab.server.run(lab.program, specs_of(spec)).steps
        plan = make_plan(service.manifest, "train", service.access.order)
        dataset = str(service.dataset)
    differing = [step for step in range(1, STEPS + 1) if found[step].sample_hash != expected[step].sample_hash]
    assert differing == [WRONG_STEP]
    audit = SampleAudit(dataset, plan, service.manifest, cache_bytes=1 << 20)
    try:
        for step in range(1, WRONG_STEP):
            audit.submit(step, found[step].sample_hash)
        assert audit.settle(WRONG_STEP - 1, deadline_s=30)
        audit.submit(WRONG_STEP, found[WRONG_STEP].sample_hash)
        with pytest.raises(DeliveryError, match=f"step {WRONG_STEP}: the rows that the ranks consumed"):
            audit.settle(WRONG_STEP, deadline_s=30)
    finally:
        audit.close()


@pytest.mark.parametrize("case", [Case(1, 1), Case(1, 2)], ids=str)
def test_a_wrong_row_fails_the_run(lab: Lab, case: Case) -> None:
    with row_service(lab.folder, SEQ_LEN, GLOBAL_BATCH, SEED, sources=(_WrongRow,)) as service:
        spec = replace(lab.spec(case, lab.folder / f"wrong-row-{case}"), data=service.access)
        with pytest.raises(RanksFailedError) as caught:
            lab.server.run(lab.program, specs_of(spec))
    story = next(iter(caught.value.failures.values()))
    assert "DeliveryError" in story
    assert f"global batch {WRONG_STEP - 1}, slot 3" in story
