"""Traces of a rank's steps by torch's profiler, when somebody asks for them.

Owns beginning, ending and writing. A trace changes no result, and one that fails is said in the log and left out: it
must not end a run.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from data_service import storage
from trainer.protocol import ProfileSteps

__all__ = ["StepTracer"]

_log = logging.getLogger(__name__)


class StepTracer:
    """Traces the steps of one rank."""

    def __init__(self, rank: int, device: torch.device) -> None:
        """Trace nothing yet."""
        self._rank = rank
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._seen = 0
        self._request: ProfileSteps | None = None
        self._left = 0
        self._profile: profile | None = None

    @contextlib.contextmanager
    def step(self, request: ProfileSteps | None) -> Iterator[None]:
        """Around each optimizer step; begins a trace when the request is a new one, and ends it when it is full."""
        if self._profile is None and request is not None and request.number > self._seen:
            self._begin(request)
        yield
        if self._profile is not None:
            self._left -= 1
            if self._left <= 0:
                self.end()

    def end(self) -> None:
        """Write what was traced, also where the run ends before all steps that were asked for."""
        traced, self._profile = self._profile, None
        if traced is None:
            return
        assert self._request is not None, "a trace was asked for"
        try:
            traced.stop()
            with tempfile.TemporaryDirectory(prefix="stormjib-trace-") as folder:
                file = Path(folder, "trace.json.gz")
                traced.export_chrome_trace(str(file))
                storage.write_bytes(storage.join(self._request.uri, self.file_name(self._rank)), file.read_bytes())
        except Exception:  # a trace must not end a run
            _log.exception("the trace of rank %d could not be written", self._rank)

    @staticmethod
    def file_name(rank: int) -> str:
        """Of a rank's trace in the folder of a request; chrome://tracing and Perfetto read it."""
        return f"rank_{rank:05d}.json.gz"

    def _begin(self, request: ProfileSteps) -> None:
        self._request, self._seen, self._left = request, request.number, request.steps
        try:
            self._profile = profile(activities=self._activities, record_shapes=True)
            self._profile.start()
        except Exception:  # see above
            self._profile = None
            _log.exception("rank %d cannot be traced", self._rank)
