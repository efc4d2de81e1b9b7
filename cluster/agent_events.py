"""What a node agent tells the controller: plain records that travel through Ray. No Ray, no torch."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["AgentEvent", "AgentInfo", "ExitPayload"]


@dataclass(frozen=True)
class AgentInfo:
    """An agent and its node."""

    node_id: str
    host: str
    """Address at which other nodes reach this one."""
    pid: int
    slots: int
    gpu_ids: tuple[str, ...]
    """The GPUs that were assigned to the agent, as CUDA_VISIBLE_DEVICES names them."""


@dataclass(frozen=True)
class AgentEvent:
    """Something that happened on a node."""

    seq: int
    """1 for the agent's first event; rises by 1."""
    kind: Literal["report", "exit", "log"]
    attempt: int
    rank: int
    payload: str
    """`report`: JSON of a `trainer.protocol.Report`; `exit`: JSON of an `ExitPayload`; `log`: a line for people."""
    time: float
    """Unix seconds by the node's clock."""


@dataclass(frozen=True)
class ExitPayload:
    """How a rank process ended by itself, or by another's hand; ranks that the agent was told to stop send none."""

    code: int
    """Exit status; negative: the signal that ended it. 0 only after the rank said that it had finished."""
    error: str
    """The message of the rank's error where it could tell, otherwise the end of its log; empty on success."""
    error_type: str | None
    """Name of the exception class, where the rank could tell."""
    retryable: bool
    """What the error says of itself; False where there was none."""
    log_tail: tuple[str, ...]
    """The last lines of the rank's log, at most 30."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ExitPayload":
        """The inverse of `to_json`."""
        value = json.loads(text)
        return cls(
            code=int(value["code"]),
            error=str(value["error"]),
            error_type=value["error_type"],
            retryable=bool(value["retryable"]),
            log_tail=tuple(value["log_tail"]),
        )
