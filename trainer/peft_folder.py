"""Adapters as a folder that `peft` loads onto the base model.

Owns `adapter_config.json` and the names of the tensors in `adapter_model.safetensors` (peft 0.21, `LoraConfig` and
`set_peft_model_state_dict`). GPT-2 holds queries, keys and values in one matrix: its adapter stacks the three A, and
lays the three B on the diagonal.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data_service import storage
from trainer.adapters import Base, Lora, is_whole, trained_shapes
from trainer.architecture import TransformerConfig
from trainer.hf_tensors import place_of
from trainer.safetensors_io import make_header

__all__ = ["save_adapters"]

_PREFIX = "base_model.model."
_CLASSIFIERS = {"bert": ["classifier", "pooler"]}


def save_adapters(
    folder: str, config: TransformerConfig, lora: Lora, base: Base, tensors: Mapping[str, Tensor]
) -> None:
    """Write the folder; `adapter_config.json` last.

    Args:
        folder: path or URI.
        config: shape of the whole model.
        lora: the adapters.
        base: what they were trained on.
        tensors: canonical name to value of all that was trained.
    """
    stored = _stored(config, lora, tensors)
    header, _ = make_header([(name, "F32", tuple(one.shape)) for name, one in stored.items()], {"format": "pt"})
    with storage.publish(storage.join(folder, "adapter_model.safetensors")) as file:
        file.write(header)
        for one in stored.values():
            file.write(one.to(torch.float32).contiguous().view(-1).view(torch.uint8).numpy().data)
    text = json.dumps(_describe(config, lora, base), indent=2).encode()
    storage.write_bytes(storage.join(folder, "adapter_config.json"), text)


def _describe(config: TransformerConfig, lora: Lora, base: Base) -> dict[str, Any]:
    """Peft's `LoraConfig`; the targets are a pattern over whole paths, since names repeat below other parents."""
    modules = {_module_of(f"blocks.0.{target}", config): target for target in lora.targets}
    prefix = re.escape(next(iter(modules)).partition(".0.")[0])
    local = "|".join(re.escape(module.partition(".0.")[2]) for module in modules)
    fused = [module.partition(".0.")[2] for module, target in modules.items() if _parts(target, config) > 1]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.num_labels else "CAUSAL_LM",
        "base_model_name_or_path": base.folder,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "target_modules": rf"(.*\.)?{prefix}\.\d+\.({local})",
        "rank_pattern": {module: 3 * lora.rank for module in fused},
        "alpha_pattern": {module: 3 * lora.alpha for module in fused},
        "modules_to_save": _CLASSIFIERS.get(config.family, ["score"]) if config.num_labels else None,
        "inference_mode": True,
    }


def _stored(config: TransformerConfig, lora: Lora, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Peft's names and values, in the order of the layers."""
    stored: dict[str, Tensor] = {}
    for name in trained_shapes(config, lora):
        if is_whole(name):
            stored[_PREFIX + place_of(name, config).name] = tensors[name]
            continue
        matrix, _, kind = name.rpartition(".")
        path = f"{_PREFIX}{_module_of(matrix, config)}.lora_{kind[-1].upper()}.weight"
        if path not in stored:
            stored[path] = tensors[name] if _parts(matrix, config) == 1 else _fused(matrix, kind, config, tensors)
    return stored


def _fused(matrix: str, kind: str, config: TransformerConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """A or B of a matrix that holds queries, keys and values; zeros where one of them has no adapter."""
    parent = matrix.rpartition(".")[0]
    names = [f"{parent}.{part}.{kind}" for part in ("q", "k", "v")]
    like = tensors[f"{matrix}.{kind}"]
    parts = [tensors.get(name, torch.zeros_like(like)) for name in names]
    if kind == "lora_a":
        return torch.cat(parts)
    whole: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]  # torch ships no types for it
    return whole


def _module_of(matrix: str, config: TransformerConfig) -> str:
    return place_of(f"{matrix}.weight", config).name.removesuffix(".weight")


def _parts(matrix: str, config: TransformerConfig) -> int:
    found = matrix if matrix.startswith("blocks.") else f"blocks.0.{matrix}"
    return place_of(f"{found}.weight", config).parts
