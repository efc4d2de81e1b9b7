"""A committed checkpoint as a Hugging Face folder.

Streams the fp32 masters tensor by tensor, whatever mesh wrote them; needs no engine and no GPU. Beside the folder's own
files writes `stormjib.json`, which says where the weights come from.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from data_service import storage
from trainer.adapters import Base, Lora, base_of, check_base, trained_shapes
from trainer.checkpoint import load_ranges
from trainer.errors import ManifestInvalidError
from trainer.fragments import Range
from trainer.hf import open_weights, save_hf
from trainer.lora import merged
from trainer.manifest import Manifest, read_manifest
from trainer.model import TransformerConfig, parameter_shapes
from trainer.peft_folder import save_adapters

__all__ = [
    "ADAPTER_FOLDER",
    "PROVENANCE_FILE",
    "Provenance",
    "export_checkpoint",
    "model_config",
    "read_provenance",
    "trained_weights",
]

PROVENANCE_FILE = "stormjib.json"
ADAPTER_FOLDER = "adapter"
"""Below an export of a run that trained adapters: they alone, as `peft` loads them."""


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
    config, state = model_config(manifest), manifest.state
    digest = hashlib.blake2b(digest_size=8)
    trained = trained_weights(checkpoints_uri, manifest, config)
    if state.lora is not None and state.base is not None:
        adapters = dict(trained)
        save_adapters(storage.join(out_uri, ADAPTER_FOLDER), config, state.lora, state.base, adapters)
        trained = _merged_weights(config, state.lora, state.base, adapters)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, whole in trained:
            digest.update(whole.contiguous().view(-1).view(torch.uint8).numpy().data)
            yield name, whole

    save_hf(out_uri, config, tensors(), tokenizer_uri, dtype, state.labels or None)
    provenance = Provenance(step, manifest.attempt, digest.hexdigest(), manifest.state.dataset_digest)
    text = json.dumps(asdict(provenance), indent=2).encode()
    storage.write_bytes(storage.join(out_uri, PROVENANCE_FILE), text)
    return provenance


def trained_weights(
    checkpoints_uri: str, manifest: Manifest, config: TransformerConfig
) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, fp32 values) of all that a checkpoint holds, one in memory at a time, in the layers' order."""
    for name, shape in trained_shapes(config, manifest.state.lora).items():
        whole = torch.empty(math.prod(shape), dtype=torch.float32)
        for fragment in load_ranges(checkpoints_uri, manifest, [Range(name, "master", 0, whole.numel())]):
            whole[fragment.start : fragment.start + fragment.numel] = fragment.data
        yield name, whole.view(shape)


def _merged_weights(
    config: TransformerConfig, lora: Lora, base: Base, adapters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The whole model: weights of the base, with the adapters added to those that have one."""
    check_base(base, base_of(base.folder))
    weights = open_weights(base.folder, config)
    for name in parameter_shapes(config):
        matrix = name.removesuffix(".weight")
        if name in adapters:
            yield name, adapters[name]
        elif f"{matrix}.lora_a" in adapters:
            yield name, merged(weights[name], adapters[f"{matrix}.lora_a"], adapters[f"{matrix}.lora_b"], lora)
        else:
            yield name, weights[name].float()


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
    if trained_shapes(config, manifest.state.lora) != manifest.state.parameters:
        raise ManifestInvalidError(
            f"Step {manifest.step} holds parameters that its model does not have. Use another step."
        )
    return config
