"""What happens in a run: a closed list of events, one JSON line each.

`events.jsonl` is read by people, by `stormjib status` and by the next controller of the same run; `v` changes when the
meaning of a field does.
"""

import time
from enum import StrEnum
from typing import Any

from cluster.journal import Journal
from cluster.states import RunState, check_transition

__all__ = ["EVENTS_VERSION", "Event", "EventLog"]

EVENTS_VERSION = 1


class Event(StrEnum):
    """Every event there is; the comment names the fields it adds."""

    RUN_STARTED = "run_started"  # config_digest, pid, resumed
    STATE_CHANGED = "state_changed"  # previous
    NODES_READY = "nodes_ready"  # nodes: [{node_id, host, slots, pid}], all known by now
    DATASET_READY = "dataset_ready"  # digest, generation, documents, tokens, rejects, seconds
    # workers: [{role, node_id, address, pid}] that serve by now; again after each repair. With a service that is not
    # the run's own none, and control: its addresses
    DATA_SERVICE_READY = "data_service_ready"
    ATTEMPT_STARTED = "attempt_started"  # dp, pp, resume_step, ranks: [{rank, node_id, slot}]
    ATTEMPT_RUNNING = "attempt_running"  # phases: seconds by phase, the slowest rank's
    RANK_LOST = "rank_lost"  # rank, node_id, exit_code, error (its class), reason
    NODE_LOST = "node_lost"  # node_id
    DATA_WORKER_LOST = "data_worker_lost"
    ATTEMPT_STOPPED = "attempt_stopped"  # reason
    RECOVERED = "recovered"  # lost_step, resume_step, step, seconds, phases: {stop_s, place_s, start_s, step_s}
    # step, bytes, write_s: longest standstill of a rank for it, total_s: until the slowest part was durable
    CHECKPOINT_COMMITTED = "checkpoint_committed"
    CHECKPOINT_SKIPPED = "checkpoint_skipped"  # step, reason
    CHECKPOINTS_SET_ASIDE = "checkpoints_set_aside"  # step: the newest that is left, set_aside: steps
    EXPORTED = "exported"  # step, uri, digest
    SERVING = "serving"  # url, step
    STOP_REQUESTED = "stop_requested"
    RUN_ENDED = "run_ended"  # step, error


class EventLog:
    """Writes events and holds the run's state."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.state = RunState.PENDING
        self.attempt = 0

    def write(self, event: Event, *, node_id: str | None = None, fields: dict[str, Any] | None = None) -> None:
        """Append one event; it is on the disk, or in the object store, when this returns."""
        self._journal.append(
            {
                "v": EVENTS_VERSION,
                "time": round(time.time(), 3),
                "monotonic_s": round(time.monotonic(), 4),
                "event": event.value,
                "state": self.state.value,
                "attempt": self.attempt,
                "node_id": node_id,
                **(fields or {}),
            }
        )
        self._journal.flush()

    def enter(self, state: RunState) -> None:
        """Change the state and record it; nothing happens when it is the state already."""
        if state is self.state:
            return
        check_transition(self.state, state)
        previous, self.state = self.state, state
        self.write(Event.STATE_CHANGED, fields={"previous": previous.value})
