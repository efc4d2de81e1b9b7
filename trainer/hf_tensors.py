"""Where each parameter lies in the weights of a Hugging Face model.

Owns the names and the layout of each family's tensors: GPT-2 stores matrices transposed, and queries, keys and values
as one. Knows nothing of files.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.architecture import Family, TransformerConfig, parameter_shapes

__all__ = [
    "Place",
    "bare_name",
    "is_ignored",
    "place_of",
    "stored_shape",
    "stored_tensors",
    "take",
    "written_shapes",
]

_LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.q": "attn.c_attn",
    "attention.k": "attn.c_attn",
    "attention.v": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
_BERT_BLOCK = {
    "attention_norm": "attention.output.LayerNorm",
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
    "feed_forward_norm": "output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
}
_BLOCKS: dict[Family, tuple[str, dict[str, str]]] = {
    "llama": ("model.layers", _LLAMA_BLOCK),
    "qwen2": ("model.layers", _LLAMA_BLOCK),
    "qwen3": ("model.layers", _LLAMA_BLOCK),
    "gpt2": ("transformer.h", _GPT2_BLOCK),
    "bert": ("bert.encoder.layer", _BERT_BLOCK),
}
_LLAMA_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "head.classifier.weight": "score.weight",
}
_GPT2_OUTER = {
    "embedding.weight": "transformer.wte.weight",
    "embedding.positions": "transformer.wpe.weight",
    "head.norm.weight": "transformer.ln_f.weight",
    "head.norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
    "head.classifier.weight": "score.weight",
}
_BERT_OUTER = {
    "embedding.weight": "bert.embeddings.word_embeddings.weight",
    "embedding.positions": "bert.embeddings.position_embeddings.weight",
    "embedding.token_types": "bert.embeddings.token_type_embeddings.weight",
    "embedding.norm.weight": "bert.embeddings.LayerNorm.weight",
    "embedding.norm.bias": "bert.embeddings.LayerNorm.bias",
    "head.transform.weight": "cls.predictions.transform.dense.weight",
    "head.transform.bias": "cls.predictions.transform.dense.bias",
    "head.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "head.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "head.weight": "cls.predictions.decoder.weight",
    "head.bias": "cls.predictions.bias",
    "head.pooler.weight": "bert.pooler.dense.weight",
    "head.pooler.bias": "bert.pooler.dense.bias",
    "head.classifier.weight": "classifier.weight",
    "head.classifier.bias": "classifier.bias",
}
_OUTER: dict[Family, dict[str, str]] = {
    "llama": _LLAMA_OUTER,
    "qwen2": _LLAMA_OUTER,
    "qwen3": _LLAMA_OUTER,
    "gpt2": _GPT2_OUTER,
    "bert": _BERT_OUTER,
}
_FUSED = ("attention.q", "attention.k", "attention.v")
_BASE = re.compile(r"(model|transformer|bert)\.")
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|embeddings\.position_ids)")
"""Tensors that old folders hold and that say nothing."""
_OTHER_HEADS = re.compile(r"(lm_head|score|classifier|cls|pooler)\..*")
"""Ends of a model; those that its `config.json` does not call for may lie in its folder."""


@dataclass(frozen=True)
class Place:
    """Where a parameter is stored."""

    name: str
    """Of the tensor in the folder."""
    part: int = 0
    """Which equal part of the tensor's outputs the parameter is."""
    parts: int = 1
    transposed: bool = False
    """[in, out], as GPT-2 has its matrices."""


def place_of(name: str, config: TransformerConfig) -> Place:
    """Where the parameter with a canonical name is stored."""
    if name == "head.bias" and not config.tie_embeddings:
        return Place("cls.predictions.decoder.bias")  # `transformers` adds this one, and ties it to the other
    matched = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if matched is None:
        return Place(_OUTER[config.family][name])
    prefix, names = _BLOCKS[config.family]
    local, kind = matched[2], matched[3]
    stored = f"{prefix}.{matched[1]}.{names[local]}.{kind}"
    if config.family != "gpt2" or local.endswith("norm"):
        return Place(stored)
    if local in _FUSED:
        return Place(stored, _FUSED.index(local), len(_FUSED), transposed=kind == "weight")
    return Place(stored, transposed=kind == "weight")


def bare_name(stored: str) -> str:
    """A tensor's name without the prefix of its base model, which folders of bare models leave out."""
    matched = _BASE.match(stored)
    bare = stored[matched.end() :] if matched is not None else stored
    return bare.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def is_ignored(bare: str) -> bool:
    """Whether a tensor that no parameter is stored in may be left alone: a buffer, or the end of another model."""
    return _BUFFERS.fullmatch(bare) is not None or _OTHER_HEADS.fullmatch(bare) is not None


def take(stored: Tensor, place: Place) -> Tensor:
    """The parameter, of the tensor that it is stored in."""
    return (stored.T if place.transposed else stored).chunk(place.parts, dim=0)[place.part]


def stored_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor in which a parameter of `shape` is stored."""
    whole = (shape[0] * place.parts, *shape[1:])
    return whole[::-1] if place.transposed else whole


def written_shapes(config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of a folder's tensors in the order in which `stored_tensors` gives them."""
    for name, shape in parameter_shapes(config).items():
        place = place_of(name, config)
        if place.part == place.parts - 1:
            yield place.name, stored_shape(place, shape)


def stored_tensors(tensors: Iterable[tuple[str, Tensor]], config: TransformerConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as a folder holds them; parts wait in memory until all of one tensor are there.

    Args:
        tensors: (canonical name, values) in the order of `parameter_shapes`, each once.
        config: shape of the model.
    """
    shapes = parameter_shapes(config)
    expected = iter(shapes)
    waiting: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        assert name == next(expected, None), f"each parameter once, in the order of parameter_shapes: {name}"
        assert tuple(tensor.shape) == shapes[name], (name, tensor.shape)
        place = place_of(name, config)
        parts = waiting.setdefault(place.name, [])
        parts.append(tensor)
        if len(parts) == place.parts:
            whole = torch.cat(parts) if place.parts > 1 else tensor
            del waiting[place.name]
            yield place.name, whole.T if place.transposed else whole
    assert next(expected, None) is None, "each parameter once, in the order of parameter_shapes"
