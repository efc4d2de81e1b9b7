"""Where the figures of a run go: TensorBoard, and the services that the user asks for.

The controller holds one recorder for a run. What is written here is for people: a service that fails is said once and
left out, and the run goes on. The figures that count are in `metrics.jsonl`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from trainer.metrics import RunFacts, evaluation_figures, step_figures
from trainer.observe.config import ObserveConfig
from trainer.observe.services import MlflowSink, WandbSink
from trainer.observe.tensorboard import TensorBoardWriter
from trainer.protocol import EvalReport, StepReport

__all__ = ["Recorder", "Sink", "open_recorder"]

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """One place that takes figures."""

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """One point of each figure."""

    def text(self, step: int, tag: str, markdown: str) -> None:
        """One text."""

    def close(self) -> None:
        """Bring everything out."""


class Recorder:
    """Hands figures to every sink that still works."""

    def __init__(self, sinks: Mapping[str, Sink], announce: Callable[[str], None]) -> None:
        """Take the sinks.

        Args:
            sinks: by the key that asks for them.
            announce: takes one line for people when a sink fails.
        """
        self._sinks = dict(sinks)
        self._announce = announce

    def forget_after(self, step: int) -> None:
        """Steps after `step` are computed again."""

        def forget(sink: Sink) -> None:
            if isinstance(sink, TensorBoardWriter):
                sink.forget_after(step)

        self._each(forget)

    def step(self, report: StepReport, facts: RunFacts) -> None:
        """One optimizer step."""
        figures = step_figures(report, facts)
        self._each(lambda sink: sink.scalars(report.step, figures))

    def evaluation(self, report: EvalReport, samples: Sequence[tuple[str, str]]) -> None:
        """One evaluation; samples are (prompt, continuation) as text."""
        figures = evaluation_figures(report)
        self._each(lambda sink: sink.scalars(report.step, figures))
        if samples:
            text = "\n\n".join(f"**{prompt}**{continuation}" for prompt, continuation in samples)
            self._each(lambda sink: sink.text(report.step, "eval/samples", text))

    def close(self) -> None:
        """Bring everything out."""
        self._each(lambda sink: sink.close())
        self._sinks = {}

    def _each(self, act: Callable[[Sink], None]) -> None:
        for name in list(self._sinks):
            try:
                act(self._sinks[name])
            except Exception as error:  # whatever a service's library raises must not end a run
                _log.warning("%s takes no more figures", name, exc_info=error)
                self._announce(f"{name}: {type(error).__name__}: {error}; the run goes on without it")
                del self._sinks[name]


def open_recorder(
    config: ObserveConfig, root: str, name: str, described: Mapping[str, Any], announce: Callable[[str], None]
) -> Recorder:
    """Open every sink that the section asks for; one that cannot be opened is said and left out.

    Args:
        config: the `observe` section.
        root: the run's folder.
        name: of the run.
        described: the resolved configuration.
        announce: takes one line for people.
    """
    sinks: dict[str, Sink] = {}

    def add(key: str, make: Callable[[], Sink]) -> None:
        try:
            sinks[key] = make()
        except Exception as error:  # see _each
            _log.warning("%s cannot be opened", key, exc_info=error)
            announce(f"{key}: {type(error).__name__}: {error}; the run goes on without it")

    if config.tensorboard:
        add("observe.tensorboard", lambda: TensorBoardWriter(f"{root.rstrip('/')}/tensorboard"))
    if (wandb := config.wandb) is not None:
        add("observe.wandb", lambda: WandbSink(wandb, root, name, described))
    if (mlflow := config.mlflow) is not None:
        add("observe.mlflow", lambda: MlflowSink(mlflow, root, name, described))
    return Recorder(sinks, announce)
