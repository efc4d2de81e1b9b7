"""Arithmetic of a model: what one token costs. Pure; loads no torch."""

import math

from trainer.architecture import TransformerConfig, parameter_shapes

__all__ = ["attention_flops_per_token", "flops_per_token", "matrix_parameters"]

_LOOKED_UP = ("embedding.weight", "embedding.positions", "embedding.token_types")
_PER_ROW = ("head.pooler.weight", "head.classifier.weight")


def matrix_parameters(config: TransformerConfig) -> int:
    """Parameters that each token is multiplied with: matrices of the blocks and of the output, no look-ups.

    A tied matrix counts once, as the output's; a classifier's head works on one token of a row and counts for nothing.
    """
    shapes = parameter_shapes(config)
    held = sum(
        math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name not in (*_LOOKED_UP, *_PER_ROW)
    )
    return held + (config.vocab_size * config.d_model if config.tie_embeddings else 0)


def attention_flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of scores and weighted values, over all blocks: 12 L N H T.

    The convention of Chowdhery et al. 2022, appendix B, which counts the hidden half of a causal row too.
    """
    return 12.0 * config.num_layers * config.num_heads * config.head_dim * seq_len


def flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """Model FLOPs for a token, forward and backward: 6 M + 12 L N H T (Chowdhery et al. 2022, appendix B).

    M are the parameters that a token is multiplied with (`matrix_parameters`); recomputation does not count.

    Args:
        config: shape of the model.
        seq_len: tokens of a row.
    """
    return 6.0 * matrix_parameters(config) + attention_flops_per_token(config, seq_len)
