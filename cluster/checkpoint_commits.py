"""Turns the parts that ranks report into committed checkpoints. Only the controller does this."""

import logging
from collections import deque
from dataclasses import dataclass, field, replace

from pydantic import JsonValue

from cluster.config import RunConfig
from cluster.events import Event
from cluster.run_store import RunWriter
from data_service.audit import SampleAudit
from trainer import manifest, retention
from trainer.errors import CheckpointError
from trainer.manifest import PartReceipt, TrainState
from trainer.protocol import PartReport

__all__ = ["CheckpointCommitter"]

_log = logging.getLogger(__name__)


@dataclass
class _Pending:
    step: int
    receipts: dict[int, PartReceipt] = field(default_factory=dict)
    state: TrainState | None = None
    write_s: float = 0.0
    total_s: float = 0.0


class CheckpointCommitter:
    """Collects the receipts of one attempt; commits a step when all ranks have reported and its rows were audited."""

    def __init__(self, writer: RunWriter, config: RunConfig, world_size: int, audit: SampleAudit | None) -> None:
        self._writer = writer
        self._config = config.train.checkpoint
        self._config_tree: dict[str, JsonValue] = config.resolved()
        self._world_size = world_size
        self._audit = audit
        self._pending: dict[int, _Pending] = {}
        self._whole: deque[_Pending] = deque()
        self.committed: set[int] = set()
        """Steps that were committed."""

    @property
    def is_waiting(self) -> bool:
        """Whether a whole checkpoint waits for the audit of its steps."""
        return bool(self._whole)

    def add(self, report: PartReport) -> None:
        """Take one part; with the last one the checkpoint is whole, and waits for `commit_audited`."""
        pending = self._pending.setdefault(report.step, _Pending(report.step))
        pending.receipts[report.rank] = report.receipt
        pending.state = report.state or pending.state
        pending.write_s = max(pending.write_s, report.write_s)
        pending.total_s = max(pending.total_s, report.total_s)
        if len(pending.receipts) == self._world_size and pending.state is not None:
            self._whole.append(self._pending.pop(report.step))

    def commit_audited(self) -> list[int]:
        """Commit the whole checkpoints whose steps the audit has found right; returns their steps. Does not wait.

        Raises:
            CheckpointError: the parts do not cover the model exactly once, or another attempt has fenced this one out.
            DeliveryError: a step consumed wrong rows.
        """
        committed = []
        while self._whole and (self._audit is None or self._audit.is_settled(self._whole[0].step)):
            pending = self._whole.popleft()
            self._commit(pending)
            committed.append(pending.step)
        return committed

    def _commit(self, pending: _Pending) -> None:
        assert pending.state is not None, "a whole checkpoint has its state"
        receipts = [pending.receipts[rank] for rank in sorted(pending.receipts)]
        uri = self._writer.folder.checkpoints_uri
        state = replace(pending.state, config=self._config_tree)
        manifest.commit(uri, pending.step, self._writer.events.attempt, receipts, state)
        self._writer.flush()
        self._writer.events.write(
            Event.CHECKPOINT_COMMITTED,
            fields={
                "step": pending.step,
                "bytes": sum(receipt.num_bytes for receipt in receipts),
                "write_s": round(pending.write_s, 4),
                "total_s": round(pending.total_s, 4),
            },
        )
        self.committed.add(pending.step)
        self._prune(uri, pending.step)

    def _prune(self, uri: str, newest: int) -> None:
        scores = self._writer.folder.history().scores
        complete = [step for step in manifest.list_complete(uri) if step <= newest]
        keep = retention.kept_steps(complete, scores, self._config.keep_last, self._config.keep_best)
        try:
            retention.prune(uri, keep, newest=newest)
        except (OSError, CheckpointError) as error:
            _log.warning("old checkpoints could not be removed from %s: %s", uri, error)
