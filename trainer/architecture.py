"""What a model is, without its weights: its shape, its layers, and the one name of each of its parameters.

Owns `TransformerConfig`, which describes every family that can be trained, the list of layers that pipeline stages are
cut from, and the canonical names and shapes of parameters. Checkpoints, export and initialisation use only canonical
names. Needs no torch, so that a planner may ask; the modules are in `trainer.layers`, the model in `trainer.model`.
"""

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from data_service.errors import ConfigError
from trainer.config import ModelConfig

__all__ = [
    "Activation",
    "Family",
    "LayerSpec",
    "RopeScaling",
    "TransformerConfig",
    "canonical_name",
    "canonical_names",
    "family_traits",
    "layers",
    "parameter_shapes",
]

Family = Literal["llama", "qwen2", "qwen3", "gpt2", "bert"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
LayerKind = Literal["embedding", "block", "head"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was first trained on.

    `linear` divides them (Chen et al. 2023), `llama3` divides the slow ones (Llama 3.1), `yarn` blends by wavelength
    and scales the rotation (Peng et al. 2023). `dynamic` changes nothing up to `max_positions`, which no row exceeds
    here; it is kept so that an export says it.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_max_positions: int | None = None
    """Positions before stretching (llama3, yarn)."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above original_max_positions / low_freq_factor are divided by `factor`."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below original_max_positions / high_freq_factor stay."""
    attention_factor: float | None = None
    """yarn: scale of cosines and sines; None derives it from `factor`."""
    beta_fast: float | None = None
    """yarn: rotations above which a frequency stays; None is 32."""
    beta_slow: float | None = None
    """yarn: rotations below which a frequency is divided by `factor`; None is 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """yarn: where both are set, they derive `attention_factor`."""
    truncate: bool = True
    """yarn: round the bounds of the blend to whole dimensions."""


@dataclass(frozen=True)
class TransformerConfig:
    """The whole shape of a model. Fields after `max_positions` have Llama's values where they are not named."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    """The output matrix is the embedding's; False where there is none (`num_labels`)."""
    init_std: float
    max_positions: int
    """Positions that have an angle or a vector: the longest row that the model takes."""
    family: Family = "llama"
    """Whose names and layout an export has."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias."""
    norm_place: Literal["before", "after"] = "before"
    """`before` each part of a block with one more at the end, or `after` each residual sum and after the embedding."""
    positions: Literal["rotary", "learned"] = "rotary"
    rope_scaling: RopeScaling | None = None
    activation: Activation = "silu"
    gated: bool = True
    """The feed-forward layer is activation(gate) · up; else activation(up)."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys of each head are normalised before they are rotated."""
    causal: bool = True
    """Tokens see earlier tokens only."""
    token_types: int = 0
    """Vectors of segments; all tokens are of the first here."""
    num_labels: int = 0
    """0: a language model. Else classes of the rows, told from one pooled token."""

    def __post_init__(self) -> None:
        """Accept `rope_scaling` as the dictionary that a manifest holds; refuse a tied matrix that is not there."""
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        assert not (self.num_labels and self.tie_embeddings), "a classifier has no output matrix to tie"

    @classmethod
    def from_section(cls, model: ModelConfig, vocab_size: int, seq_len: int, num_labels: int = 0) -> Self:
        """Resolve the `model` section.

        Args:
            model: the section; with `from` set, the shape is read from that folder's `config.json`.
            vocab_size: entries of the tokenizer.
            seq_len: tokens of a training row.
            num_labels: classes to tell apart; 0 for a language model.

        Raises:
            ConfigError: the folder's model cannot take that vocabulary or those rows, or is of an unknown kind.
        """
        if model.from_ is not None:
            found = _read_folder(model.from_, vocab_size, seq_len, num_labels)
            return cls(**{one.name: getattr(found, one.name) for one in fields(cls)})
        step = 8 * model.d_model / 3 if model.family in ("llama", "qwen2", "qwen3") else 4 * model.d_model
        return cls(
            vocab_size=vocab_size,
            d_model=model.d_model,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads if model.num_kv_heads is not None else model.num_heads,
            head_dim=model.head_dim if model.head_dim is not None else model.d_model // model.num_heads,
            d_ff=model.d_ff if model.d_ff is not None else math.ceil(step / 32) * 32,
            rope_theta=model.rope_theta,
            norm_eps=model.norm_eps,
            tie_embeddings=model.tie_embeddings and num_labels == 0,
            init_std=model.init_std,
            max_positions=seq_len,
            num_labels=num_labels,
            **family_traits(model.family),
        )

    @property
    def pooling(self) -> Literal["first", "last"]:
        """The token that a row's class is told from: an encoder's first, a decoder's last."""
        return "last" if self.causal else "first"

    @property
    def num_parameters(self) -> int:
        """Trained scalars; tied matrices count once."""
        return sum(math.prod(shape) for shape in parameter_shapes(self).values())


def family_traits(family: Family) -> dict[str, Any]:
    """The fields of `TransformerConfig` that a family fixes, as its first published models have them."""
    if family == "gpt2":
        return {
            "family": family,
            "norm": "layer",
            "positions": "learned",
            "activation": "gelu_tanh",
            "gated": False,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
        }
    if family == "bert":
        return {
            **family_traits("gpt2"),
            "family": family,
            "norm_place": "after",
            "activation": "gelu",
            "causal": False,
            "token_types": 2,
        }
    return {"family": family, "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}


def _read_folder(folder: str, vocab_size: int, seq_len: int, num_labels: int) -> TransformerConfig:
    from trainer.hf import read_config  # hf builds on this module

    found = read_config(folder)
    if found.vocab_size < vocab_size:
        raise ConfigError(
            f"model.from={folder}: its vocabulary has {found.vocab_size} entries, the dataset's tokenizer "
            f"{vocab_size}. Set data.tokenizer.path to that folder and prepare again."
        )
    if found.max_positions < seq_len:
        raise ConfigError(
            f"model.from={folder}: it takes rows of at most {found.max_positions} tokens, "
            f"data.seq_len={seq_len}. Lower data.seq_len."
        )
    if num_labels == 0 and not found.causal:
        raise ConfigError(
            f"model.from={folder} is an encoder: it sees the tokens that it would have to predict. Set "
            "train.task=text_classification, or start from a causal language model."
        )
    if num_labels == 0 and found.num_labels > 0:
        raise ConfigError(
            f"model.from={folder} is a classifier of {found.num_labels} classes; it has no output matrix to predict "
            "tokens with. Start from a language model, or set train.task=text_classification."
        )
    if num_labels > 0:
        return replace(found, num_labels=num_labels, tie_embeddings=False)
    return found


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the list that pipeline stages are cut from."""

    kind: LayerKind
    index: int
    """Number of the block in the model; 0 for the embedding and the head."""


def layers(config: TransformerConfig) -> list[LayerSpec]:
    """The model as the list that pipeline stages are cut from: embedding, blocks, head."""
    blocks = [LayerSpec("block", index) for index in range(config.num_layers)]
    return [LayerSpec("embedding", 0), *blocks, LayerSpec("head", 0)]


def canonical_name(layer: LayerSpec, local_name: str, config: TransformerConfig) -> str:
    """The one name of a parameter.

    Args:
        layer: the layer that holds the parameter.
        local_name: its name inside the layer's module, such as `attention.q.weight`.
        config: shape of the model; with tied embeddings the head's matrix is the embedding's.
    """
    if layer.kind == "block":
        return f"blocks.{layer.index}.{local_name}"
    if layer.kind == "head" and not (config.tie_embeddings and local_name == "weight"):
        return f"head.{local_name}"
    return f"embedding.{local_name}"


def canonical_names(config: TransformerConfig) -> tuple[str, ...]:
    """Names of all parameters in the order of the layers; each once."""
    return tuple(parameter_shapes(config))


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every parameter, without allocating any."""
    return dict(_shapes(config))


_Shapes = dict[str, tuple[int, ...]]


@functools.lru_cache(maxsize=16)
def _shapes(config: TransformerConfig) -> _Shapes:
    shapes = {f"embedding.{name}": shape for name, shape in _embedding_shapes(config).items()}
    block = _block_shapes(config)
    for index in range(config.num_layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return shapes | {f"head.{name}": shape for name, shape in _head_shapes(config).items()}


def _embedding_shapes(config: TransformerConfig) -> _Shapes:
    width = config.d_model
    shapes: _Shapes = {"weight": (config.vocab_size, width)}
    if config.positions == "learned":
        shapes["positions"] = (config.max_positions, width)
    if config.token_types:
        shapes["token_types"] = (config.token_types, width)
    if config.norm_place == "after":
        shapes |= _norm_shapes("norm", width, config)
    return shapes


def _block_shapes(config: TransformerConfig) -> _Shapes:
    width, heads, kv_heads = config.d_model, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = _norm_shapes("attention_norm", width, config)
    shapes |= _linear_shapes("attention.q", width, heads, config.qkv_bias)
    shapes |= _linear_shapes("attention.k", width, kv_heads, config.qkv_bias)
    shapes |= _linear_shapes("attention.v", width, kv_heads, config.qkv_bias)
    shapes |= _linear_shapes("attention.out", heads, width, config.out_bias)
    if config.qk_norm:
        shapes |= {"attention.q_norm.weight": (config.head_dim,), "attention.k_norm.weight": (config.head_dim,)}
    shapes |= _norm_shapes("feed_forward_norm", width, config)
    if config.gated:
        shapes |= _linear_shapes("feed_forward.gate", width, config.d_ff, config.mlp_bias)
    shapes |= _linear_shapes("feed_forward.up", width, config.d_ff, config.mlp_bias)
    return shapes | _linear_shapes("feed_forward.down", config.d_ff, width, config.mlp_bias)


def _head_shapes(config: TransformerConfig) -> _Shapes:
    width, shapes = config.d_model, _Shapes()
    encoder = config.norm_place == "after"
    if config.num_labels == 0:
        if not config.tie_embeddings:
            shapes["weight"] = (config.vocab_size, width)
        if encoder:
            shapes["bias"] = (config.vocab_size,)
            shapes |= _linear_shapes("transform", width, width, True)
        return shapes | _norm_shapes("norm", width, config)
    if encoder:
        shapes |= _linear_shapes("pooler", width, width, True)
    else:
        shapes |= _norm_shapes("norm", width, config)
    return shapes | _linear_shapes("classifier", width, config.num_labels, encoder)


def _linear_shapes(name: str, width_in: int, width_out: int, bias: bool) -> _Shapes:
    return {f"{name}.weight": (width_out, width_in)} | ({f"{name}.bias": (width_out,)} if bias else {})


def _norm_shapes(name: str, width: int, config: TransformerConfig) -> _Shapes:
    shapes: _Shapes = {f"{name}.weight": (width,)}
    return shapes | {f"{name}.bias": (width,)} if config.norm == "layer" else shapes
