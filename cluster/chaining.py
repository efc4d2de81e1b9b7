"""`model.from: run://NAME@best`: a run that starts from the weights of another one.

Owns which checkpoint such a reference means, and the copy of it that the run keeps: it is exported once, to `base/` in
the run's own folder, so that later steps, prunes and better checkpoints of the other run change nothing. The other run
lies beside this one, below the same `run.storage`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from cluster.config import RunConfig
from cluster.policies import choose_promotion
from cluster.run_store import RunFolder
from data_service import storage
from data_service.errors import ConfigError
from data_service.manifest import tokenizer_uri
from serve.exports import finished_exports
from trainer import manifest
from trainer.config import RUN_REFERENCE
from trainer.errors import CheckpointError

__all__ = ["Reference", "base_uri", "check_base", "choose_step", "parse_reference", "peek_base", "with_base"]

_TRIES = 3
"""How often a checkpoint is chosen where the other run removes what was chosen."""


@dataclass(frozen=True)
class Reference:
    """What a reference names."""

    run: str
    which: str | int
    """`best`, `latest`, or a step."""


def parse_reference(text: str | None) -> Reference | None:
    """The reference that `model.from` is; None where it is a folder or nothing."""
    matched = re.fullmatch(RUN_REFERENCE, text or "")
    if matched is None:
        return None
    which = matched["which"] or "best"
    return Reference(matched["run"], int(which.removeprefix("step=")) if which.startswith("step=") else which)


def base_uri(config: RunConfig) -> str:
    """Where a run keeps the weights that it started from."""
    return f"{config.root}/base"


def choose_step(folder: RunFolder, which: str | int) -> int:
    """The committed step that a reference means.

    Raises:
        ConfigError: there is none; the message lists those that are there.
    """
    complete = manifest.list_complete(folder.checkpoints_uri)
    if isinstance(which, int):
        found = which if which in complete else None
    else:
        found = choose_promotion(complete, folder.history().scores, "best" if which == "best" else "last")
    if found is None:
        there = ", ".join(map(str, complete)) or "none"
        asked = f"step {which}" if isinstance(which, int) else f"its {which} step"
        raise ConfigError(
            f"model.from names {asked} of the run in {folder.root}; its committed checkpoints are: {there}. Train that "
            "run first, or name another step."
        )
    return found


def check_base(config: RunConfig) -> None:
    """See that what `model.from` refers to is there, or was copied before; reads no weights.

    Raises:
        ConfigError: it is not.
    """
    reference = parse_reference(config.model.from_)
    if reference is not None and not storage.exists(storage.join(base_uri(config), "config.json")):
        choose_step(_other_run(config, reference), reference.which)


def peek_base(config: RunConfig) -> RunConfig:
    """The configuration with `model.from` a folder whose model has the shape of what a reference means; copies nothing.

    Raises:
        ConfigError: neither this run nor the other one has such a folder.
    """
    reference = parse_reference(config.model.from_)
    if reference is None:
        return config
    uri = base_uri(config)
    if not storage.exists(storage.join(uri, "config.json")):
        exports = finished_exports(storage.join(_other_run(config, reference).root, "export"))
        if not exports:
            raise ConfigError(
                f"model.from={config.model.from_}: that run has no export yet, which tells the shape of its model. "
                "Train it to its end, or `stormjib export` it, first."
            )
        uri = exports[max(exports)].uri
    return _from_folder(config, uri)


def with_base(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """The configuration with `model.from` a folder: a reference is resolved once, then what was exported stands.

    Args:
        config: of the run.
        say: is told what was taken.

    Raises:
        ConfigError: the other run is not there, has no such checkpoint, or removes each one that is chosen.
        CheckpointError: its checkpoint is damaged.
    """
    reference = parse_reference(config.model.from_)
    if reference is None:
        return config
    from trainer.export import read_provenance

    uri = base_uri(config)
    if read_provenance(uri) is None:
        step = _copy(_other_run(config, reference), reference.which, uri)
        say(f"model.from={config.model.from_} is step {step}; its weights were copied to {uri}")
    return _from_folder(config, uri)


def _copy(folder: RunFolder, which: str | int, uri: str) -> int:
    """Export what a reference means; returns its step. A run that still trains may remove it meanwhile."""
    from trainer.export import export_checkpoint

    dataset = folder.saved_config().get("data", {}).get("dataset") or f"{folder.root}/dataset"
    cause: Exception | None = None
    for _ in range(_TRIES):
        step = choose_step(folder, which)
        try:
            export_checkpoint(folder.checkpoints_uri, step, uri, tokenizer_uri(dataset))
            return step
        except (CheckpointError, FileNotFoundError) as error:
            if step in manifest.list_complete(folder.checkpoints_uri):
                raise  # it was not removed: it is damaged
            cause = error
    raise ConfigError(
        f"model.from: {_TRIES} times the run in {folder.root} removed the checkpoint that was being copied: it is "
        "still training. Wait until it has ended, or raise its train.checkpoint.keep_last."
    ) from cause


def _from_folder(config: RunConfig, uri: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"from_": uri})})


def _other_run(config: RunConfig, reference: Reference) -> RunFolder:
    folder = RunFolder(storage.join(config.run.storage, reference.run))
    if not folder.exists():
        raise ConfigError(
            f"model.from={config.model.from_}: there is no run in {folder.root}. Runs are looked for below "
            "run.storage; train that one first."
        )
    return folder
