"""A committed checkpoint as a Hugging Face folder.

Streams the fp32 masters tensor by tensor, whatever mesh wrote them; needs no engine and no GPU. Beside the folder's own
files writes `stormjib.json`, which says where the weights come from.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from data_service import storage
from trainer.checkpoint import load_ranges
from trainer.errors import ManifestInvalidError
from trainer.fragments import Range
from trainer.hf import save_hf
from trainer.manifest import Manifest, read_manifest
from trainer.model import TransformerConfig, parameter_shapes

__all__ = ["PROVENANCE_FILE", "Provenance", "export_checkpoint", "model_config", "read_provenance"]

PROVENANCE_FILE = "stormjib.json"


@dataclass(frozen=True)
class Provenance:
    """Where an exported folder's weights come from."""

    step: int
    attempt: int
    digest: str
    """blake2b-64 of the fp32 masters in the order of `parameter_shapes`, hexadecimal."""
    dataset_digest: str


def export_checkpoint(
    checkpoints_uri: str,
    step: int,
    out_uri: str,
    tokenizer_uri: str | None,
    dtype: Literal["F32", "BF16"] = "F32",
) -> Provenance:
    """Write a folder that `transformers` loads with the checkpoint's logits.

    Args:
        checkpoints_uri: the run's checkpoints.
        step: a committed one.
        out_uri: folder to write; its `config.json` is written last but for the provenance.
        tokenizer_uri: the dataset's `tokenizer/`.
        dtype: of the written weights.

    Raises:
        CheckpointError: the step does not exist or is damaged.
        ConfigError: there is no tokenizer at `tokenizer_uri`.
    """
    manifest = read_manifest(checkpoints_uri, step)
    config = model_config(manifest)
    digest = hashlib.blake2b(digest_size=8)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in parameter_shapes(config).items():
            whole = torch.empty(math.prod(shape), dtype=torch.float32)
            for fragment in load_ranges(checkpoints_uri, manifest, [Range(name, "master", 0, whole.numel())]):
                whole[fragment.start : fragment.start + fragment.numel] = fragment.data
            digest.update(whole.view(torch.uint8).numpy().data)
            yield name, whole.view(shape)

    save_hf(out_uri, config, tensors(), tokenizer_uri, dtype)
    provenance = Provenance(step, manifest.attempt, digest.hexdigest(), manifest.state.dataset_digest)
    text = json.dumps(asdict(provenance), indent=2).encode()
    storage.write_bytes(storage.join(out_uri, PROVENANCE_FILE), text)
    return provenance


def read_provenance(folder: str) -> Provenance | None:
    """What `export_checkpoint` wrote beside the weights; None in a folder that it did not write.

    Raises:
        ManifestInvalidError: the file is garbled.
    """
    uri = storage.join(folder, PROVENANCE_FILE)
    try:
        return Provenance(**json.loads(storage.read_bytes(uri)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ManifestInvalidError(f"{uri} does not name a step and a digest: {error}. Export again.") from error


def model_config(manifest: Manifest) -> TransformerConfig:
    """The shape of the model in a checkpoint.

    Raises:
        ManifestInvalidError: the manifest describes no model, or one whose parameters are others.
    """
    try:
        config = TransformerConfig(**manifest.state.model)  # type: ignore[arg-type]  # compared below
    except TypeError as error:
        raise ManifestInvalidError(f"Step {manifest.step} describes no model: {error}. Use another step.") from error
    if parameter_shapes(config) != manifest.state.parameters:
        raise ManifestInvalidError(
            f"Step {manifest.step} holds parameters that its model does not have. Use another step."
        )
    return config
