"""Which steps are skipped, which stop a run, and what is said then."""

import json
import math
from dataclasses import replace

import pytest

from trainer.config import GuardConfig
from trainer.errors import LossSpikeError, NonFiniteLossError
from trainer.guard import Guard, GuardState
from trainer.manifest import TrainState
from trainer.protocol import PartReport, report_from_json, report_to_json

from tests.unit.test_engine_protocol import RECEIPT, STATE  # isort: skip


def _guard(**keys: object) -> Guard:
    return Guard(GuardConfig.model_validate(keys), GuardState())


def _record(guard: Guard, step: int, loss: float, norm: float = 1.0) -> bool:
    return guard.record(step, step + 99, loss, norm, counted=True, overflowed=False)


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf), (2.0, -1.0)]
)
def test_what_is_no_number_stops_the_run_and_names_the_batch(loss: float, norm: float) -> None:
    guard = _guard()
    assert not _record(guard, 6, 2.0)
    with pytest.raises(NonFiniteLossError, match=r"Step 7 \(global batch 106\)") as caught:
        _record(guard, 7, loss, norm)
    told = str(caught.value)
    assert "data.skip=[{first: 106, end: 107}]" in told
    assert "`stormjib checkpoint drop FILE --after 6`" in told


def test_a_leap_of_the_loss_is_found_once_the_window_is_full() -> None:
    guard = _guard(spike_factor=3, window=4)
    for step, loss in enumerate((9.0, 90.0, 2.0, 3.0, 6.0), start=1):
        _record(guard, step, loss)
    assert guard.state.losses == (90.0, 2.0, 3.0, 6.0)
    assert guard.judge(13.4, 1.0) == "good", "three times the median of 2, 3, 6 and 90 is 13.5"
    assert guard.judge(13.6, 1.0) == "spike"
    with pytest.raises(LossSpikeError, match=r"loss 14,.*spike_factor=3 times the median 4\.5"):
        _record(guard, 6, 14.0)


def test_a_spike_is_looked_for_only_where_it_is_asked_for() -> None:
    guard = _guard()
    for step in range(1, 100):
        assert not _record(guard, step, 1.0)
    assert guard.state == GuardState(), "and nothing is kept"
    assert not _record(guard, 100, 1e6)


def test_skipped_steps_do_not_count_as_losses_and_too_many_in_a_row_stop() -> None:
    guard = _guard(action="skip", spike_factor=2, window=4, max_skips=3)
    for step in range(1, 5):
        assert not _record(guard, step, 1.0)
    assert _record(guard, 5, 7.0)
    assert _record(guard, 6, math.nan)
    assert not _record(guard, 7, 1.5)
    assert guard.state == GuardState((1.0, 1.0, 1.0, 1.5), skipped=2)
    assert _record(guard, 8, 9.0)
    assert _record(guard, 9, 9.0)
    assert guard.state == GuardState((1.0, 1.0, 1.0, 1.5), skipped=4, in_row=2, first_batch=107)
    with pytest.raises(LossSpikeError, match=r"Step 10 \(global batches 107 to 109\).*max_skips=3") as caught:
        _record(guard, 10, 9.0)
    assert "data.skip=[{first: 107, end: 110}]" in str(caught.value)
    assert "--after 7`" in str(caught.value)


def test_an_overflow_of_fp16_is_neither_a_loss_nor_a_fault() -> None:
    guard = _guard(spike_factor=2, window=4)
    assert guard.record(1, 1, 5.0, math.inf, counted=True, overflowed=True)
    assert guard.state == GuardState(skipped=1)
    with pytest.raises(NonFiniteLossError):
        guard.record(2, 2, math.nan, math.inf, counted=True, overflowed=True)


def test_a_batch_without_a_unit_has_no_loss_to_compare() -> None:
    guard = _guard(spike_factor=2, window=4)
    assert not guard.record(1, 1, 0.0, 0.0, counted=False, overflowed=False)
    assert guard.state.losses == ()


def test_judging_is_the_same_from_any_checkpoint_on() -> None:
    losses = [1.0 + 0.1 * math.sin(step) + (50.0 if step % 7 == 6 else 0.0) for step in range(40)]
    keys = {"action": "skip", "spike_factor": 1.5, "window": 8}
    whole = _guard(**keys)
    decisions = [_record(whole, step + 1, loss) for step, loss in enumerate(losses)]
    assert sum(decisions) == 4, "the first leap comes before the window is full"
    for cut in range(len(losses)):
        guard = _guard(**keys)
        for step in range(cut):
            _record(guard, step + 1, losses[step])
        stored = report_to_json(PartReport(10, 1, RECEIPT, replace(STATE, guard=guard.state), 0.5))
        json.loads(stored)
        again = report_from_json(stored)
        assert isinstance(again, PartReport)
        assert isinstance(again.state, TrainState)
        resumed = Guard(GuardConfig.model_validate(keys), again.state.guard)
        assert [_record(resumed, step + 1, losses[step]) for step in range(cut, len(losses))] == decisions[cut:]
        assert resumed.state == whole.state
