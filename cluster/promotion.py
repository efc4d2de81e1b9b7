"""Takes a checkpoint out of training: chooses it, exports it, and finds it again."""

import hashlib
from dataclasses import dataclass

from cluster.config import RunConfig
from cluster.events import Event
from cluster.policies import choose_promotion
from cluster.run_store import RunFolder, RunWriter
from data_service.errors import ConfigError
from trainer import manifest

__all__ = ["Export", "export_step", "newest_export", "promote"]


@dataclass(frozen=True)
class Export:
    """A Hugging Face folder made from a checkpoint."""

    uri: str
    step: int
    digest: str
    """Digest of the checkpoint it was made from."""


def promote(config: RunConfig, writer: RunWriter) -> Export:
    """Export the checkpoint that `serve.promote` asks for, and record it.

    Raises:
        ConfigError: there is no checkpoint yet.
    """
    folder = writer.folder
    complete = manifest.list_complete(folder.checkpoints_uri)
    losses = {step: values["loss"] for step, values in folder.history().evals.items()}
    step = choose_promotion(complete, losses, config.serve.promote)
    if step is None:
        raise ConfigError(f"{folder.checkpoints_uri}: no committed checkpoint to promote. Train first.")
    export = export_step(config, step, folder.export_uri(step))
    writer.events.write(Event.EXPORTED, fields={"step": step, "uri": export.uri, "digest": export.digest})
    return export


def export_step(config: RunConfig, step: int, out_uri: str) -> Export:
    """Write the weights of a committed step as a Hugging Face folder.

    Raises:
        CheckpointError: the step is not complete.
    """
    from trainer.export import export_checkpoint

    uri = RunFolder(config.root).checkpoints_uri
    export_checkpoint(uri, step, out_uri, f"{config.dataset_uri}/tokenizer")
    content = manifest.read_manifest(uri, step).to_json().encode()
    return Export(out_uri, step, hashlib.blake2b(content, digest_size=16).hexdigest())


def newest_export(config: RunConfig) -> Export:
    """The export that was recorded last.

    Raises:
        ConfigError: nothing was exported yet.
    """
    for event in reversed(RunFolder(config.root).events()):
        if event["event"] == Event.EXPORTED.value:
            return Export(event["uri"], int(event["step"]), event["digest"])
    raise ConfigError(f"{config.root}: no export yet. Run `stormjib train` or `stormjib export` on this file first.")
