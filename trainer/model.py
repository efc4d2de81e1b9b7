"""The Transformer and the one name of each of its parameters.

Owns the shape of the model, its modules as a list of layers that pipeline stages are cut from, and the map from a
parameter of a layer to its canonical name. Checkpoints, export and initialisation use only canonical names. Refuses to
know of ranks, sharding, losses or caches: attention goes through a context (`trainer.attention`). Weights are laid out
as in Hugging Face's Llama (rotate-half rotary positions), so that export is a renaming.

Modules are built with uninitialised weights: fill them with what `trainer.initialise` draws, or from a checkpoint.

Shape letters: B rows, T tokens, D model width, F feed-forward width, N query heads, K key/value heads, H head width,
V vocabulary.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_service.errors import ConfigError
from trainer.attention import AttentionContext, CausalContext, within_documents
from trainer.config import ModelConfig

__all__ = [
    "Attention",
    "Block",
    "Embedding",
    "FeedForward",
    "Head",
    "LayerSpec",
    "Linear",
    "RMSNorm",
    "Transformer",
    "TransformerConfig",
    "canonical_name",
    "canonical_names",
    "default_positions",
    "layers",
    "named_parameters",
    "parameter_shapes",
]

LayerKind = Literal["embedding", "block", "head"]


@dataclass(frozen=True)
class TransformerConfig:
    """The whole shape of a model; no value is implied."""

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
    init_std: float
    max_positions: int
    """Positions with a rotary angle: the longest row that the model takes."""

    @classmethod
    def from_section(cls, model: ModelConfig, vocab_size: int, seq_len: int) -> Self:
        """Resolve the `model` section.

        Args:
            model: the section; with `from` set, the shape is read from that folder's `config.json`.
            vocab_size: entries of the tokenizer.
            seq_len: tokens of a training row.

        Raises:
            ConfigError: the folder's model cannot take that vocabulary or those rows, or is of an unknown kind.
        """
        if model.from_ is not None:
            from trainer.hf import read_config  # hf builds on this module

            found = read_config(model.from_)
            if found.vocab_size < vocab_size:
                raise ConfigError(
                    f"model.from={model.from_}: its vocabulary has {found.vocab_size} entries, the dataset's tokenizer "
                    f"{vocab_size}. Set data.tokenizer.path to that folder and prepare again."
                )
            if found.max_positions < seq_len:
                raise ConfigError(
                    f"model.from={model.from_}: it takes rows of at most {found.max_positions} tokens, "
                    f"data.seq_len={seq_len}. Lower data.seq_len."
                )
            return cls(**{name: getattr(found, name) for name in cls.__dataclass_fields__})
        d_ff = model.d_ff if model.d_ff is not None else -(-model.d_model * 8 // (3 * 32)) * 32
        return cls(
            vocab_size=vocab_size,
            d_model=model.d_model,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads if model.num_kv_heads is not None else model.num_heads,
            head_dim=model.head_dim if model.head_dim is not None else model.d_model // model.num_heads,
            d_ff=d_ff,
            rope_theta=model.rope_theta,
            norm_eps=model.norm_eps,
            tie_embeddings=model.tie_embeddings,
            init_std=model.init_std,
            max_positions=seq_len,
        )

    @property
    def num_parameters(self) -> int:
        """Trained scalars; tied matrices count once."""
        return sum(torch.Size(shape).numel() for shape in parameter_shapes(self).values())


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the list that pipeline stages are cut from."""

    kind: LayerKind
    index: int
    """Number of the block in the model; 0 for the embedding and the head."""


class Linear(nn.Module):
    """A matrix without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Allocate [out_features, in_features], uninitialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last axis."""
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019, equation 4) of the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        """Allocate [width], uninitialised."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and scale; the mean is taken in fp32."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Embedding(nn.Module):
    """Token ids to vectors; with tied embeddings also vectors to logits."""

    def __init__(self, config: TransformerConfig) -> None:
        """Allocate [V, D], uninitialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look up; returns [B, T, D]."""
        return F.embedding(tokens_BT, self.weight)

    def project(self, normed_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of normalised hidden states, by the tied matrix."""
        return F.linear(normed_BTD, self.weight)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions (Su et al. 2021)."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        """Allocate the four projections, uninitialised."""
        super().__init__()
        self.config = config
        self.layer = layer
        self.q = Linear(config.d_model, config.num_heads * config.head_dim)
        self.k = Linear(config.d_model, config.num_kv_heads * config.head_dim)
        self.v = Linear(config.d_model, config.num_kv_heads * config.head_dim)
        self.out = Linear(config.num_heads * config.head_dim, config.d_model)

    def forward(self, normed_BTD: Tensor, positions_BT: Tensor, context: AttentionContext) -> Tensor:
        """Attend through the context; returns [B, T, D]."""
        num_rows, num_tokens, _ = normed_BTD.shape
        config = self.config
        q_BTNH = self.q(normed_BTD).view(num_rows, num_tokens, config.num_heads, config.head_dim)
        k_BTKH = self.k(normed_BTD).view(num_rows, num_tokens, config.num_kv_heads, config.head_dim)
        v_BTKH = self.v(normed_BTD).view(num_rows, num_tokens, config.num_kv_heads, config.head_dim)
        cos_PH, sin_PH = _rotary_table(config.head_dim, config.rope_theta, config.max_positions, normed_BTD.device)
        cos_BT1H = cos_PH[positions_BT].to(normed_BTD.dtype)[:, :, None]
        sin_BT1H = sin_PH[positions_BT].to(normed_BTD.dtype)[:, :, None]
        out_BTNH = context.attend(
            self.layer, _rotate(q_BTNH, cos_BT1H, sin_BT1H), _rotate(k_BTKH, cos_BT1H, sin_BT1H), v_BTKH
        )
        merged: Tensor = self.out(out_BTNH.reshape(num_rows, num_tokens, config.num_heads * config.head_dim))
        return merged


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, equation 6, without biases)."""

    def __init__(self, config: TransformerConfig) -> None:
        """Allocate the three projections, uninitialised."""
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff)
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, normed_BTD: Tensor) -> Tensor:
        """Returns [B, T, D]."""
        out: Tensor = self.down(F.silu(self.gate(normed_BTD)) * self.up(normed_BTD))
        return out


class Block(nn.Module):
    """One pre-norm Transformer block."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        """Allocate the block, uninitialised.

        Args:
            config: shape of the model.
            layer: index in the whole model; passed on to the attention context.
        """
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, context: AttentionContext) -> Tensor:
        """Returns the next hidden states, [B, T, D]."""
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), positions_BT, context)
        next_BTD: Tensor = hidden_BTD + self.feed_forward(self.feed_forward_norm(hidden_BTD))
        return next_BTD


class Head(nn.Module):
    """Final norm and, where embeddings are not tied, the output matrix."""

    weight: nn.Parameter | None

    def __init__(self, config: TransformerConfig) -> None:
        """Allocate the norm and, untied, [V, D]; uninitialised."""
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if config.tie_embeddings:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    def forward(self, hidden_BTD: Tensor, tied_VD: Tensor | None = None) -> Tensor:
        """Logits [B, T, V].

        Args:
            hidden_BTD: output of the last block.
            tied_VD: the embedding matrix where embeddings are tied, else None.
        """
        weight = tied_VD if self.weight is None else self.weight
        assert weight is not None, "a tied head needs the embedding matrix"
        return F.linear(self.norm(hidden_BTD), weight)


class Transformer(nn.Module):
    """The whole model in one process."""

    def __init__(self, config: TransformerConfig) -> None:
        """Allocate all layers, uninitialised (under `torch.device("meta")`: without storage)."""
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """Logits of every token.

        Args:
            tokens_BT: int64 ids below V.
            positions_BT: int64 below `max_positions`; by default 0 … T-1 in every row.
            doc_ids_BT: where given, and `context` is not, attention stays within documents; they do not fall in a row.
            context: how to attend; by default causally.

        Returns:
            [B, T, V] in the dtype of the weights.
        """
        if positions_BT is None:
            positions_BT = default_positions(tokens_BT)
        if context is None:
            context = CausalContext() if doc_ids_BT is None else within_documents(doc_ids_BT)
        return self.logits(self.hidden(tokens_BT, positions_BT, context))

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, context: AttentionContext) -> Tensor:
        """Output of the last block, [B, T, D], before the final norm."""
        hidden_BTD: Tensor = self.embedding(tokens_BT)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, positions_BT, context)
        return hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Final norm and output matrix on any [B, T', D] taken from `hidden`; returns [B, T', V]."""
        logits_BTV: Tensor = self.head(hidden_BTD, self.embedding.weight if self.config.tie_embeddings else None)
        return logits_BTV


def default_positions(tokens_BT: Tensor) -> Tensor:
    """Positions 0 … T-1 in every row, int64 [B, T]."""
    num_rows, num_tokens = tokens_BT.shape
    return torch.arange(num_tokens, device=tokens_BT.device).expand(num_rows, num_tokens)


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


@functools.lru_cache(maxsize=16)
def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    width, heads, kv_heads = config.d_model, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, width)}
    for index in range(config.num_layers):
        shapes |= {
            f"blocks.{index}.attention_norm.weight": (width,),
            f"blocks.{index}.attention.q.weight": (heads, width),
            f"blocks.{index}.attention.k.weight": (kv_heads, width),
            f"blocks.{index}.attention.v.weight": (kv_heads, width),
            f"blocks.{index}.attention.out.weight": (width, heads),
            f"blocks.{index}.feed_forward_norm.weight": (width,),
            f"blocks.{index}.feed_forward.gate.weight": (config.d_ff, width),
            f"blocks.{index}.feed_forward.up.weight": (config.d_ff, width),
            f"blocks.{index}.feed_forward.down.weight": (width, config.d_ff),
        }
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, width)
    shapes["head.norm.weight"] = (width,)
    return shapes


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every parameter, without allocating any."""
    return dict(_shapes(config))


def named_parameters(
    module: nn.Module, layer: LayerSpec, config: TransformerConfig
) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name, parameter) of one layer's module, wherever that module lives."""
    for local_name, parameter in module.named_parameters():
        yield canonical_name(layer, local_name, config), parameter


@functools.lru_cache(maxsize=8)
def _rotary_table(head_dim: int, theta: float, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of Su et al. 2021, equation 15, each repeated for both halves: fp32 [positions, H]."""
    with torch.inference_mode(False), torch.no_grad():
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
        angles = torch.outer(torch.arange(num_positions, device=device).float(), 1.0 / theta**exponents)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()


def _rotate(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Rotate pairs (h, h + H/2), Hugging Face's layout of rotary positions."""
    first, second = x_BTNH.chunk(2, dim=-1)
    return x_BTNH * cos_BT1H + torch.cat((-second, first), dim=-1) * sin_BT1H
