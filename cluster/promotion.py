"""Takes a checkpoint out of training: chooses it, exports it, and finds it again."""

from typing import Literal

from cluster.config import RunConfig
from cluster.events import Event
from cluster.policies import choose_promotion
from cluster.run_store import RunFolder, RunWriter
from data_service.errors import ConfigError
from data_service.manifest import tokenizer_uri
from serve.exports import FinishedExport, finished_exports
from trainer import manifest

__all__ = ["Export", "export_step", "newest_export", "promote"]

Export = FinishedExport
"""What a run hands to its endpoint."""


def promote(config: RunConfig, writer: RunWriter) -> Export:
    """Export the checkpoint that `serve.promote` asks for, and record it.

    Raises:
        ConfigError: there is no checkpoint yet.
    """
    folder = writer.folder
    complete = manifest.list_complete(folder.checkpoints_uri)
    scores = folder.history().scores
    step = choose_promotion(complete, scores, config.serve.promote)
    if step is None:
        raise ConfigError(f"{folder.checkpoints_uri}: no committed checkpoint to promote. Train first.")
    export = export_step(config, step, folder.export_uri(step))
    writer.events.write(Event.EXPORTED, fields={"step": step, "uri": export.uri, "digest": export.digest})
    return export


def export_step(config: RunConfig, step: int, out_uri: str, dtype: Literal["F32", "BF16"] = "F32") -> Export:
    """Write the weights of a committed step as a Hugging Face folder.

    Raises:
        CheckpointError: the step is not complete.
    """
    from trainer.export import export_checkpoint

    uri = RunFolder(config.root).checkpoints_uri
    provenance = export_checkpoint(uri, step, out_uri, tokenizer_uri(config.dataset_uri), dtype)
    return Export(out_uri, provenance.step, provenance.digest)


def newest_export(config: RunConfig) -> Export:
    """The export that was promoted last, where its folder is still whole; else the highest step that was exported.

    Raises:
        ConfigError: nothing was exported yet.
    """
    folder = RunFolder(config.root)
    finished = finished_exports(f"{folder.root}/export")
    promoted = [int(event["step"]) for event in folder.events() if event["event"] == Event.EXPORTED.value]
    step = promoted[-1] if promoted and promoted[-1] in finished else max(finished, default=None)
    if step is None:
        raise ConfigError(
            f"{folder.root}/export: no export yet. Run `stormjib train` or `stormjib export` on this file first."
        )
    return finished[step]
