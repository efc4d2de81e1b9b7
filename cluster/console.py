"""What a person sees of a run: a live bar on a terminal, plain lines in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.pace import Pace, shown_seconds
from data_service.progress import PrepareProgress

__all__ = ["RunConsole"]

_PLAIN_EVERY_S = 5.0


class RunConsole:
    """Prints the progress of a run to standard error, so that standard output stays for results."""

    def __init__(self, *, total_steps: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._total = total_steps
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed = 0.0
        self._pace = Pace()
        self._checkpoint = 0
        self._rate = 0.0

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False)

    def prepare(self, progress: PrepareProgress) -> None:
        """The preparation of the data has come this far; said at most every few seconds."""
        now = time.monotonic()
        left_s = self._pace.left_s(progress.stage, progress.done, progress.total, now)
        if now - self._printed >= _PLAIN_EVERY_S:
            self._printed = now
            left = "" if left_s is None else f", {shown_seconds(left_s)} left of this stage"
            rejected = f", {progress.num_rejects:,} rejected" * bool(progress.num_rejects)
            self.say(
                f"preparing the data: {progress.stage} {progress.done / 1e6:,.1f} of {progress.total / 1e6:,.1f} MB"
                f"{left}; {progress.num_records:,} records{rejected}"
            )

    def step(self, step: int, loss: float | None, tokens_per_s: float) -> None:
        """One optimizer step was done; without a loss where no token of its batch is learned."""
        self._rate = tokens_per_s if self._rate == 0.0 else 0.9 * self._rate + 0.1 * tokens_per_s
        if self._live:
            self._advance(step, loss)
        elif step == self._total or time.monotonic() - self._printed >= _PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self.say(f"step {step}/{self._total}  loss {_shown(loss, 4)}  {self._rate:,.0f} tokens/s")

    def checkpoint(self, step: int) -> None:
        """A checkpoint was committed."""
        self._checkpoint = step

    def stop(self) -> None:
        """Leave the live bar where it is, and go on with plain lines."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _advance(self, step: int, loss: float | None) -> None:
        shown = _shown(loss, 3)
        if self._progress is None:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]:,.0f} tokens/s"),
                TextColumn("checkpoint {task.fields[saved]}"),
                TimeElapsedColumn(),
                console=self._console,
                redirect_stdout=sys.stdout.isatty(),
                refresh_per_second=5,
            )
            self._task = self._progress.add_task("train", total=self._total, loss=shown, rate=0.0, saved=0)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=step, loss=shown, rate=self._rate, saved=self._checkpoint)


def _shown(loss: float | None, digits: int) -> str:
    return "-" if loss is None else f"{loss:.{digits}f}"
