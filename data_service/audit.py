"""Checks what ranks say they consumed against the dataset itself.

Ranks hash the rows that reached them. The audit reads the same rows from the shards, past workers, clients and the
network, and compares. It works in a thread behind the run; a checkpoint is committed only when the audit has caught up
with it, so that no checkpoint holds a step that was fed wrong rows.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from data_service.cache import ShardCache
from data_service.errors import DataUnavailableError, DeliveryError
from data_service.hashing import sample_hash
from data_service.metrics import WorkerMetrics
from data_service.order import rows_of_batch
from data_service.plan import Plan
from data_service.rows import ShardRows
from data_service.shards import read_index, read_manifest

__all__ = ["SampleAudit"]


@dataclass(frozen=True)
class _Check:
    step: int
    done: "Future[None]"


class SampleAudit:
    """Audits the steps of one plan."""

    def __init__(self, dataset_uri: str, plan: Plan, cache_bytes: int) -> None:
        """Nothing is read yet.

        Args:
            dataset_uri: the prepared dataset.
            plan: of the training rows.
            cache_bytes: most bytes of shards to keep in memory.
        """
        self._dataset_uri = dataset_uri
        self._plan = plan
        self._cache = ShardCache(dataset_uri, cache_bytes, WorkerMetrics())
        self._source: ShardRows | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sample-audit")
        self._checks: deque[_Check] = deque()

    def expected(self, batch: int) -> str:
        """The hash that consuming this global batch must give, read from the shards.

        Raises:
            ShardCorruptError: a shard is damaged.
        """
        if self._source is None:
            manifest = read_manifest(self._dataset_uri)
            self._source = ShardRows(manifest, read_index(self._dataset_uri, manifest), self._cache)
        block = self._source.read(self._plan, rows_of_batch(self._plan, batch))
        return sample_hash(block.row_id, block.row_crc)

    def submit(self, step: int, found: str) -> None:
        """Check, in the background, the hash that the ranks reported for an optimizer step (1 is the first)."""
        self._checks.append(_Check(step, self._thread.submit(self._check, step, found)))

    def raise_problem(self) -> None:
        """Look at the checks that are done.

        Raises:
            DeliveryError: a step consumed other rows than the plan's.
            DataError: the dataset cannot be read, or a shard of it is damaged.
        """
        while self._checks and self._checks[0].done.done():
            self._checks.popleft().done.result()

    def is_settled(self, step: int) -> bool:
        """Whether all steps up to this one were checked and found right; does not wait.

        Raises:
            DeliveryError: as `raise_problem`.
            DataError: as `raise_problem`.
        """
        self.raise_problem()
        return not any(check.step <= step for check in self._checks)

    def settle(self, step: int, deadline_s: float) -> bool:
        """Wait until all steps up to this one are checked; False when the deadline passes before.

        Raises:
            DeliveryError: as `raise_problem`.
            DataError: as `raise_problem`.
        """
        wait([check.done for check in self._checks if check.step <= step], timeout=deadline_s)
        return self.is_settled(step)

    def forget(self) -> None:
        """Drop what is not checked yet: its steps were superseded."""
        for check in self._checks:
            check.done.cancel()
        self._checks.clear()

    def close(self) -> None:
        """End the thread and free the shards."""
        self.forget()
        self._thread.shutdown(wait=True)
        self._cache.close()

    def _check(self, step: int, found: str) -> None:
        try:
            expected = self.expected(step - 1)
        except OSError as cause:
            raise DataUnavailableError(
                f"step {step}: its rows could not be audited, {self._dataset_uri} cannot be read here ({cause}). "
                "See that the controller reaches the dataset, or set data.service.audit=false."
            ) from cause
        if expected != found:
            raise DeliveryError(
                f"step {step}: the rows that the ranks consumed hash to {found}, and those of the plan to {expected}. "
                "A data worker served wrong rows. No checkpoint holds the step; look at the workers' machines, and "
                "start the run again to go on from the newest checkpoint."
            )
