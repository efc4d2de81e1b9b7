"""Turns the parts that ranks report into committed checkpoints. Only the controller does this."""

import logging
from dataclasses import dataclass, field

from cluster.events import Event
from cluster.run_store import RunWriter
from data_service.audit import SampleAudit
from trainer import manifest
from trainer.config import CheckpointConfig
from trainer.errors import CheckpointError
from trainer.manifest import PartReceipt, TrainState
from trainer.protocol import PartReport

__all__ = ["CheckpointCommitter"]

_log = logging.getLogger(__name__)

AUDIT_S = 5.0
"""A checkpoint waits so long for the audit of its steps."""


@dataclass
class _Pending:
    receipts: dict[int, PartReceipt] = field(default_factory=dict)
    state: TrainState | None = None
    write_s: float = 0.0


class CheckpointCommitter:
    """Collects the receipts of one attempt and commits a step when every rank has reported its part."""

    def __init__(self, writer: RunWriter, config: CheckpointConfig, world_size: int, audit: SampleAudit | None) -> None:
        self._writer = writer
        self._config = config
        self._world_size = world_size
        self._audit = audit
        self._pending: dict[int, _Pending] = {}

    def add(self, report: PartReport) -> int | None:
        """Take one part; returns the step when it completed a checkpoint.

        Raises:
            CheckpointError: the parts do not cover the model exactly once, or another attempt has fenced this one out.
            DeliveryError: a step up to this one consumed wrong rows.
        """
        pending = self._pending.setdefault(report.step, _Pending())
        pending.receipts[report.rank] = report.receipt
        pending.state = report.state or pending.state
        pending.write_s = max(pending.write_s, report.write_s)
        if len(pending.receipts) < self._world_size or pending.state is None:
            return None
        del self._pending[report.step]
        self._await_audit(report.step)
        receipts = [pending.receipts[rank] for rank in sorted(pending.receipts)]
        uri = self._writer.folder.checkpoints_uri
        manifest.commit(uri, report.step, self._writer.events.attempt, receipts, pending.state)
        self._writer.flush()
        self._writer.events.write(
            Event.CHECKPOINT_COMMITTED,
            fields={
                "step": report.step,
                "bytes": sum(receipt.num_bytes for receipt in receipts),
                "write_s": round(pending.write_s, 4),
            },
        )
        self._prune(uri)
        return report.step

    def _await_audit(self, step: int) -> None:
        if self._audit is not None and not self._audit.settle(step, AUDIT_S):
            _log.warning(
                "step %d is committed before its rows were audited: reading them took over %s s", step, AUDIT_S
            )

    def _prune(self, uri: str) -> None:
        history = self._writer.folder.history()
        losses = {step: values["loss"] for step, values in history.evals.items()}
        complete = manifest.list_complete(uri)
        keep = manifest.kept_steps(complete, losses, self._config.keep_last, self._config.keep_best)
        try:
            manifest.prune(uri, keep)
        except (OSError, CheckpointError) as error:
            _log.warning("old checkpoints could not be removed from %s: %s", uri, error)
