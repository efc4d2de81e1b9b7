"""What an attempt takes from its agents once the ranks are ended. The agents are stand-ins: no Ray runs."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster import attempt as attempt_module
from cluster.agent_events import AgentEvent, ExitPayload
from cluster.attempt import Attempt, _Watch
from trainer.manifest import PartReceipt
from trainer.protocol import PartReport, ReadyReport, report_to_json

PART = PartReport(20, 1, PartReceipt(20, 3, 1, "attempt_3/rank_00001.safetensors", 0, ()), None, 0.1, 0.2)
LATE = [
    AgentEvent(1, "report", 3, 1, report_to_json(ReadyReport(1, {})), 0.0),
    AgentEvent(2, "report", 3, 1, report_to_json(PART), 0.0),
    AgentEvent(3, "report", 2, 1, report_to_json(PART), 0.0),
    AgentEvent(4, "exit", 3, 1, ExitPayload(1, "nan", "NonFiniteLossError", False, ()).to_json(), 0.0),
]


class _Fake:
    """A method of an actor: what it returns is its own reference."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self, *_: Any) -> Any:
        return self._answer


@pytest.mark.parametrize("trained", [True, False])
def test_a_part_that_was_on_its_way_is_taken_when_the_ranks_are_ended(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ray = SimpleNamespace(wait=lambda refs, **_: (refs, []), get=lambda ref, **_: ref)
    monkeypatch.setattr(attempt_module, "ray", fake_ray)
    taken: list[PartReport] = []
    agent = SimpleNamespace(stop_attempt=_Fake("stopped"), poll=_Fake(LATE))
    unused: Any = None
    attempt = Attempt(
        {"n0": agent},
        {},
        SimpleNamespace(events=SimpleNamespace(attempt=3)),  # type: ignore[arg-type]
        SimpleNamespace(add=taken.append),  # type: ignore[arg-type]
        unused,
        None,
        unused,
        resume_step=0,
        best_step_before=0,
        stop_requested=lambda: False,
        on_idle_node_lost=unused,
        watch_data=unused,
        on_first_step=unused,
    )
    attempt.timing.first_step = 1.0 if trained else None
    attempt._end_ranks({"n0": _Watch(agent)})
    assert taken == ([PART] if trained else [])
    assert [one.error_type for one in attempt._exits.values()] == ["NonFiniteLossError"]
