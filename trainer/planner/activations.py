"""What the forward pass keeps for the backward pass, from the shapes of a model: the pieces, with their sizes.

Pure arithmetic over `TransformerConfig`, checked piece by piece against what autograd saves (tests). The list follows
`trainer.layers`: each matrix product keeps its input, attention its queries, keys, values and output, a norm its input
(and in fp32 on the way what it scales), an activation its input. Sums keep nothing.

Shape letters: B rows, T tokens, D model width, N query heads, K key/value heads, H head width, F feed-forward width.
"""

from dataclasses import dataclass

from trainer.architecture import TransformerConfig

__all__ = [
    "Piece",
    "block_pieces",
    "chunk_logits_bytes",
    "edge_pieces",
    "mask_bytes",
    "output_gradient_bytes",
    "total_bytes",
]

_FP32 = 4
_INT64 = 8


@dataclass(frozen=True)
class Piece:
    """One tensor that is kept."""

    name: str
    num_bytes: int


def total_bytes(pieces: list[Piece]) -> int:
    """Bytes of all pieces."""
    return sum(piece.num_bytes for piece in pieces)


def block_pieces(
    config: TransformerConfig, rows: int, seq_len: int, element_bytes: int, *, on_gpu: bool
) -> list[Piece]:
    """What one block keeps of a micro-batch.

    Args:
        config: shape of the model.
        rows: of the micro-batch (B).
        seq_len: tokens of a row (T).
        element_bytes: of the dtype that computes: 4 or 2.
        on_gpu: whether RMSNorm is one kernel (torch 2.9 and later on CUDA) or composed in fp32.
    """
    tokens = rows * seq_len
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    pieces = _norm("attention_norm", config, tokens, config.d_model, element_bytes, on_gpu)
    widths = [("attention input", config.d_model), ("queries", queries), ("keys", keys), ("values", keys)]
    widths.append(("attended", queries))
    if config.positions == "rotary":
        widths += [("cosines", config.head_dim), ("sines", config.head_dim)]
    if config.qk_norm:
        for name, width in (("q_norm", queries), ("k_norm", keys)):
            heads = width // config.head_dim
            pieces += _norm(name, config, tokens * heads, config.head_dim, element_bytes, on_gpu)
    pieces.append(Piece("log of the sums of scores", tokens * config.num_heads * _FP32))
    pieces += _norm("feed_forward_norm", config, tokens, config.d_model, element_bytes, on_gpu)
    widths.append(("feed_forward input", config.d_model))
    inner = ("gate", "activated", "up", "product") if config.gated else ("up", "activated")
    widths += [(name, config.d_ff) for name in inner]
    return pieces + [Piece(name, tokens * width * element_bytes) for name, width in widths]


def _norm(
    name: str, config: TransformerConfig, vectors: int, width: int, element_bytes: int, on_gpu: bool
) -> list[Piece]:
    """A norm keeps its input and a statistic or two of each vector; composed RMSNorm also what it scales, in fp32."""
    if config.norm == "layer":
        return [
            Piece(f"{name} input", vectors * width * element_bytes),
            Piece(f"{name} sums", 2 * vectors * element_bytes),
        ]
    kept = [Piece(f"{name} input", vectors * width * (element_bytes if on_gpu else _FP32))]
    if not on_gpu:
        kept.append(Piece(f"{name} scaled", vectors * width * _FP32))
    return [*kept, Piece(f"{name} sums", vectors * _FP32)]


def mask_bytes(rows: int, seq_len: int, element_bytes: int) -> int:
    """The table of a document mask, [B, 1, T, T], that all blocks share, and the booleans it is made of."""
    return rows * seq_len * seq_len * (element_bytes + 1)


def edge_pieces(config: TransformerConfig, rows: int, seq_len: int, element_bytes: int, *, on_gpu: bool) -> list[Piece]:
    """What lies before the first block and behind the last, the loss's gradient by the hidden states included."""
    tokens = rows * seq_len
    hidden = tokens * config.d_model * element_bytes
    pieces = [Piece("tokens", tokens * _INT64)]
    if config.positions == "learned":
        pieces.append(Piece("positions", seq_len * _INT64))
    pieces += _norm("final norm", config, tokens, config.d_model, element_bytes, on_gpu)
    if config.norm_place == "after":
        pieces += _norm("embedding norm", config, tokens, config.d_model, element_bytes, on_gpu)
        if config.num_labels == 0:
            pieces += [Piece("transform input", hidden), Piece("transform", hidden)]
    if config.num_labels == 0:
        pieces.append(Piece("gradient of normed", hidden))
    return pieces


def output_gradient_bytes(config: TransformerConfig) -> int:
    """The gradient of the output matrix (and bias), fp32, that the chunked loss makes in the forward pass."""
    if config.num_labels:
        return 0
    return (config.vocab_size * config.d_model + config.vocab_size * (config.norm_place == "after")) * _FP32


def chunk_logits_bytes(config: TransformerConfig, rows: int, seq_len: int, chunk_elements: int) -> int:
    """Most that the loss holds at once beside its gradients: a chunk's logits in fp32, their slopes and a product.

    Args:
        config: shape of the model.
        rows: of the micro-batch.
        seq_len: tokens of a row.
        chunk_elements: logits of a chunk (`trainer.losses`).
    """
    if config.num_labels:
        return 0
    chunk_tokens = min(rows * seq_len, max(64, chunk_elements // config.vocab_size // 64 * 64))
    return 3 * chunk_tokens * config.vocab_size * _FP32
