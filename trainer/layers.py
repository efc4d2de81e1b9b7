"""The modules of a Transformer: embedding, block, head, and what they are made of.

Owns the computation of one layer of each kind for every family that `trainer.architecture` describes. Refuses to know
of ranks, sharding, losses or caches: attention goes through a context (`trainer.attention`). Weights are laid out as in
Hugging Face's Llama, so that most of an export is a renaming.

Modules are built with uninitialised weights: fill them with what `trainer.initialise` draws, or from a checkpoint.

Shape letters: B rows, T tokens, D model width, F feed-forward width, N query heads, K key/value heads, H head width,
V vocabulary, C classes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.architecture import Activation, TransformerConfig
from trainer.attention import AttentionContext
from trainer.rotary import rotary_waves, rotate

__all__ = [
    "Attention",
    "Block",
    "Embedding",
    "FeedForward",
    "Head",
    "LayerNorm",
    "Linear",
    "Outputs",
    "Projection",
    "RMSNorm",
    "compile_blocks",
    "run_block",
]


@dataclass(frozen=True)
class Projection:
    """Logits that are not computed yet: what the output matrix is to be applied to, and the matrix.

    A loss takes them in pieces (`trainer.losses`), so that [B, T, V] never has to be held.
    """

    normed_BTD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None

    def logits(self) -> Tensor:
        """All logits, [B, T, V], in the dtype of the weights."""
        return F.linear(self.normed_BTD, self.weight_VD, self.bias_V)


Outputs = Projection | Tensor
"""Output of a model: of a language model its `Projection`, of a classifier logits [B, C]."""

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Module):
    """A matrix, with or without bias."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        """Allocate [out_features, in_features] and the bias, uninitialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last axis."""
        return F.linear(x, self.weight, self.bias)


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


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016, equation 4) of the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        """Allocate scale and bias, [width] each, uninitialised."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, scale and shift."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def _norm(config: TransformerConfig) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.d_model, config.norm_eps)


class Embedding(nn.Module):
    """Tokens to vectors; with tied embeddings its matrix also makes logits."""

    positions: nn.Parameter | None
    token_types: nn.Parameter | None

    def __init__(self, config: TransformerConfig, matrix_only: bool = False) -> None:
        """Allocate the matrix [V, D] and what else the family adds to it, uninitialised.

        Args:
            config: shape of the model.
            matrix_only: for the copy of a tied matrix in another pipeline stage; it cannot embed tokens.
        """
        super().__init__()
        whole = not matrix_only
        learned = whole and config.positions == "learned"
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.register_parameter("positions", _vectors(config.max_positions if learned else 0, config))
        self.register_parameter("token_types", _vectors(config.token_types if whole else 0, config))
        self.norm = _norm(config) if whole and config.norm_place == "after" else None

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Vectors of tokens, [B, T, D]; positions count where they are learned. All tokens are of the first type."""
        hidden_BTD = F.embedding(tokens_BT, self.weight)
        if self.token_types is not None:
            hidden_BTD = hidden_BTD + self.token_types[0]
        if self.positions is not None:
            hidden_BTD = hidden_BTD + F.embedding(positions_BT, self.positions)
        return hidden_BTD if self.norm is None else self.norm(hidden_BTD)


def _vectors(number: int, config: TransformerConfig) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(number, config.d_model)) if number else None


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), with rotary positions where the model has them."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        """Allocate the four projections, uninitialised."""
        super().__init__()
        self.config = config
        self.layer = layer
        self.q = Linear(config.d_model, config.num_heads * config.head_dim, config.qkv_bias)
        self.k = Linear(config.d_model, config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.v = Linear(config.d_model, config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.d_model, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, normed_BTD: Tensor, positions_BT: Tensor, context: AttentionContext) -> Tensor:
        """Attend through the context; returns [B, T, D]."""
        num_rows, num_tokens, _ = normed_BTD.shape
        config = self.config
        q_BTNH = self.q(normed_BTD).view(num_rows, num_tokens, config.num_heads, config.head_dim)
        k_BTKH = self.k(normed_BTD).view(num_rows, num_tokens, config.num_kv_heads, config.head_dim)
        v_BTKH = self.v(normed_BTD).view(num_rows, num_tokens, config.num_kv_heads, config.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if config.positions == "rotary":
            cos_BT1H, sin_BT1H = rotary_waves(config, positions_BT, normed_BTD.dtype)
            q_BTNH, k_BTKH = rotate(q_BTNH, cos_BT1H, sin_BT1H), rotate(k_BTKH, cos_BT1H, sin_BT1H)
        out_BTNH = context.attend(self.layer, q_BTNH, k_BTKH, v_BTKH)
        merged: Tensor = self.out(out_BTNH.reshape(num_rows, num_tokens, config.num_heads * config.head_dim))
        return merged


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, equation 6), or two matrices with an activation between (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, config: TransformerConfig) -> None:
        """Allocate the projections, uninitialised."""
        super().__init__()
        self.activation = _ACTIVATIONS[config.activation]
        self.gate = Linear(config.d_model, config.d_ff, config.mlp_bias) if config.gated else None
        self.up = Linear(config.d_model, config.d_ff, config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, config.mlp_bias)

    def forward(self, normed_BTD: Tensor) -> Tensor:
        """Returns [B, T, D]."""
        if self.gate is None:
            inner_BTF = self.activation(self.up(normed_BTD))
        else:
            inner_BTF = self.activation(self.gate(normed_BTD)) * self.up(normed_BTD)
        out: Tensor = self.down(inner_BTF)
        return out


class Block(nn.Module):
    """One Transformer block, normalised before its two parts or after them."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        """Allocate the block, uninitialised.

        Args:
            config: shape of the model.
            layer: index in the whole model; passed on to the attention context.
        """
        super().__init__()
        self._before = config.norm_place == "before"
        self.attention_norm = _norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, context: AttentionContext) -> Tensor:
        """Returns the next hidden states, [B, T, D]."""
        next_BTD: Tensor
        if self._before:
            hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), positions_BT, context)
            next_BTD = hidden_BTD + self.feed_forward(self.feed_forward_norm(hidden_BTD))
        else:
            hidden_BTD = self.attention_norm(hidden_BTD + self.attention(hidden_BTD, positions_BT, context))
            next_BTD = self.feed_forward_norm(hidden_BTD + self.feed_forward(hidden_BTD))
        return next_BTD


def run_block(
    block: nn.Module, hidden_BTD: Tensor, positions_BT: Tensor, context: AttentionContext, recompute: bool
) -> Tensor:
    """One block; with `recompute` only its input is kept for the backward pass, which runs it again (Chen et al. 2016).

    Nothing in a block is random, so no generator's state is kept.
    """
    if recompute and torch.is_grad_enabled():
        again: Tensor = checkpoint(
            block, hidden_BTD, positions_BT, context, use_reentrant=False, preserve_rng_state=False
        )
        return again
    out: Tensor = block(hidden_BTD, positions_BT, context)
    return out


def compile_blocks(module: nn.Module) -> None:
    """Have `torch.compile` fuse what lies between the matrix products of every block below a module.

    Measured: no gain on CPUs. A first pass of each shape takes a minute, and needs a C++ compiler (on GPUs, Triton).
    """
    # dynamo looks into the cache of rotary frequencies and says so; the few numbers are then part of the graph
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    for block in module.modules():
        if isinstance(block, Block):
            block.compile()


class Head(nn.Module):
    """The end of a model: for a language model the final norm and the output matrix, else a classifier of rows."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, config: TransformerConfig) -> None:
        """Allocate what the model's kind needs, uninitialised: see `trainer.architecture.parameter_shapes`."""
        super().__init__()
        encoder, language = config.norm_place == "after", config.num_labels == 0
        width = config.d_model
        untied = language and not config.tie_embeddings
        self.register_parameter("weight", nn.Parameter(torch.empty(config.vocab_size, width)) if untied else None)
        mlm_bias = nn.Parameter(torch.empty(config.vocab_size)) if language and encoder else None
        self.register_parameter("bias", mlm_bias)
        self._activation = _ACTIVATIONS[config.activation]
        self.transform = Linear(width, width, bias=True) if language and encoder else None
        self.pooler = Linear(width, width, bias=True) if encoder and not language else None
        self.norm = _norm(config) if language or not encoder else None
        self.classifier = None if language else Linear(width, config.num_labels, bias=encoder)

    def forward(self, hidden_BTD: Tensor, tied_VD: Tensor | None = None, doc_ids_BT: Tensor | None = None) -> Outputs:
        """The model's output.

        Args:
            hidden_BTD: output of the last block.
            tied_VD: the embedding matrix where embeddings are tied, else None.
            doc_ids_BT: of a classifier's rows, where they are padded: see `pooled`.
        """
        if self.classifier is not None:
            logits_BC: Tensor = self.classifier(self.pooled(hidden_BTD, doc_ids_BT))
            return logits_BC
        weight = tied_VD if self.weight is None else self.weight
        assert weight is not None, "a tied head needs the embedding matrix"
        return Projection(self.normed(hidden_BTD), weight, self.bias)

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        """What a language model's output matrix is applied to, [B, T, D]."""
        if self.transform is not None:
            hidden_BTD = self._activation(self.transform(hidden_BTD))
        assert self.norm is not None
        out: Tensor = self.norm(hidden_BTD)
        return out

    def pooled(self, hidden_BTD: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
        """What rows are classified by, [B, D]: of an encoder its first token, of a decoder the last of its document.

        Args:
            hidden_BTD: output of the last block.
            doc_ids_BT: the tokens that have the number of the row's first token are its document, what follows is
                padding; None where no row is padded.
        """
        if self.pooler is not None:
            pooled_BD: Tensor = torch.tanh(self.pooler(hidden_BTD[:, 0]))
            return pooled_BD
        assert self.norm is not None
        if doc_ids_BT is None:
            normed_BD: Tensor = self.norm(hidden_BTD[:, -1])
            return normed_BD
        last_B = (doc_ids_BT == doc_ids_BT[:, :1]).sum(dim=1) - 1
        rows_B = torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device)
        normed_BD = self.norm(hidden_BTD[rows_B, last_B])
        return normed_BD
