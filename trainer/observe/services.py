"""Weights & Biases and MLflow: the figures of a run, sent to services that the user has.

Both libraries are extras, imported when a run asks for them. Owns how a run is found again there when it goes on; what
the figures are is decided in `trainer.metrics`. Secrets come from the environment, as the libraries read them.
"""

import hashlib
import importlib
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from data_service import storage
from data_service.errors import ConfigError
from trainer.observe.config import MlflowConfig, WandbConfig

__all__ = ["MlflowSink", "WandbSink", "check_services"]

_LONGEST_PARAM = 500
"""Characters of a parameter's value that MLflow servers take."""


def check_services(wandb: WandbConfig | None, mlflow: MlflowConfig | None) -> None:
    """See that what a run asks for is there, before anything is started.

    Raises:
        ConfigError: a library is not installed, or Weights & Biases has no key.
    """
    if wandb is not None:
        _library("wandb", "observe.wandb")
        if wandb.mode == "online" and not os.environ.get("WANDB_API_KEY") and not _has_netrc():
            raise ConfigError(
                "observe.wandb with mode=online: WANDB_API_KEY is not set, and ~/.netrc holds no key. Set it, or set "
                "observe.wandb.mode=offline."
            )
    if mlflow is not None:
        _library("mlflow", "observe.mlflow")


class WandbSink:
    """A run in Weights & Biases."""

    def __init__(self, config: WandbConfig, root: str, name: str, described: Mapping[str, Any]) -> None:
        """Open the run, or go on with it.

        Args:
            config: the section.
            root: the run's folder; the id of the run follows from it, so that a run that goes on is the same there.
            name: what people see.
            described: the resolved configuration.

        Raises:
            ConfigError: the library is not installed.
        """
        library = _library("wandb", "observe.wandb")
        self.folder = storage.local_path(root) if storage.is_local(root) else tempfile.mkdtemp(prefix="stormjib-wandb-")
        self._run = library.init(
            project=config.project,
            entity=config.entity,
            name=name,
            id=hashlib.blake2b(root.encode(), digest_size=8).hexdigest(),
            dir=str(self.folder),
            mode=config.mode,
            resume="allow",
            config=dict(described),
            settings=library.Settings(silent=True, console="off"),
        )
        # steps may be computed again after a loss: `step` is an axis of its own, not wandb's counter, which only grows
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """One point of each figure."""
        self._run.log({"step": step, **figures})

    def text(self, step: int, tag: str, markdown: str) -> None:
        """One text."""
        html = importlib.import_module("wandb").Html
        escaped = markdown.replace("&", "&amp;").replace("<", "&lt;")
        self._run.log({"step": step, tag: html(f"<pre>{escaped}</pre>", inject=False)})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MlflowSink:
    """A run in MLflow."""

    def __init__(self, config: MlflowConfig, root: str, name: str, described: Mapping[str, Any]) -> None:
        """Open the run, or go on with it; see `WandbSink`.

        Raises:
            ConfigError: the library is not installed.
        """
        _library("mlflow", "observe.mlflow")
        self._client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=config.tracking_uri)
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = self._client.create_experiment(config.experiment) if found is None else found.experiment_id
        tag = "stormjib.run"
        mark = hashlib.blake2b(root.encode(), digest_size=8).hexdigest()
        runs = self._client.search_runs([experiment], filter_string=f"tags.`{tag}` = '{mark}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment, run_name=name, tags={tag: mark}).info.run_id
            for key, value in _flat(described):
                self._client.log_param(self._id, key, str(value)[:_LONGEST_PARAM])
        self._entities = importlib.import_module("mlflow.entities")

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """One point of each figure."""
        now = time.time_ns() // 1_000_000
        points = [self._entities.Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=points)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """One text, as an artifact."""
        self._client.log_text(self._id, markdown, f"{tag}/step_{step:08d}.md")

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


def _library(name: str, key: str) -> Any:
    """Import an extra.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as cause:
        raise ConfigError(
            f"{key} is set, and the library {name} cannot be imported ({cause}). Install it with "
            f"`pip install 'stormjib[{name}]'`, or remove {key}."
        ) from cause


def _has_netrc() -> bool:
    try:
        with open(os.path.expanduser("~/.netrc"), encoding="utf-8") as file:
            return "wandb" in file.read()
    except OSError:
        return False


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys of a tree with their values."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs
