"""Checks what ranks say they consumed against the dataset itself.

Ranks hash the rows that reached them. The audit reads the same rows from the shards, past workers, clients and the
network, and compares. It works in a thread behind the run; a checkpoint is committed only when the audit has caught up
with it, so that no checkpoint holds a step that was fed wrong rows.

It shares no cache with the workers, whose disk may be what is wrong: shards of a remote dataset are read once more.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from data_service.cache import ShardCache
from data_service.errors import DataUnavailableError, DeliveryError
from data_service.hashing import sample_hash
from data_service.manifest import DatasetManifest
from data_service.metrics import WorkerMetrics
from data_service.order import rows_of_batch
from data_service.plan import Plan
from data_service.rows import ShardRows
from data_service.shards import ShardIndex

__all__ = ["SampleAudit"]

_TOKENS_AT_ONCE = 2**22
"""Rows of a step are read in pieces of so many tokens, so that a large step takes no more memory than a small one."""


@dataclass(frozen=True)
class _Check:
    step: int
    done: "Future[None]"


class SampleAudit:
    """Audits the steps of one plan."""

    def __init__(
        self,
        dataset_uri: str,
        plan: Plan,
        manifest: DatasetManifest,
        cache_bytes: int,
        cache_dir: str | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            dataset_uri: the prepared dataset.
            plan: of the training rows.
            manifest: the generation of the dataset that the plan is of.
            cache_bytes: most bytes of shards to keep on this machine's disk, where the dataset is remote.
            cache_dir: folder for them; by default below the temporary folder.

        Raises:
            ConfigError: when the folder for them cannot be used.
        """
        self._dataset_uri = dataset_uri
        self._plan = plan
        self._read = WorkerMetrics()
        self._cache = ShardCache(dataset_uri, cache_dir=cache_dir, cache_bytes=cache_bytes, metrics=self._read)
        self._source = ShardRows(manifest, ShardIndex(dataset_uri, manifest), self._cache)
        self._rows_at_once = max(1, _TOKENS_AT_ONCE // (plan.seq_len + 1))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sample-audit")
        self._checks: deque[_Check] = deque()

    @property
    def num_read_bytes(self) -> int:
        """Bytes of shards that were read from the dataset's store so far."""
        return self._read.totals().bytes_read

    def expected(self, index: int) -> str:
        """The hash that step index `index` (0 is the first) must give, read from the shards.

        Raises:
            ShardCorruptError: a shard is damaged.
            DataUnavailableError: the storage does not answer.
        """
        rows = rows_of_batch(self._plan, index)
        found = [
            self._source.read(self._plan, rows[begin : begin + self._rows_at_once])
            for begin in range(0, rows.size, self._rows_at_once)
        ]
        return sample_hash(rows, np.concatenate([block.row_crc for block in found]))

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
