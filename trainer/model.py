"""The Transformer in one process.

Owns the walk through the layers, which are those that pipeline stages are cut from. The shape and the names are in
`trainer.architecture`, the modules in `trainer.layers`; what most callers need of both is offered here.

Shape letters: B rows, T tokens, D model width, V vocabulary, C classes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainer.architecture import (
    LayerSpec,
    RopeScaling,
    TransformerConfig,
    canonical_name,
    canonical_names,
    layers,
    parameter_shapes,
)
from trainer.attention import AttentionContext, BidirectionalContext, CausalContext, within_documents
from trainer.layers import (
    Attention,
    Block,
    Embedding,
    FeedForward,
    Head,
    LayerNorm,
    Linear,
    Outputs,
    Projection,
    RMSNorm,
    run_block,
)

__all__ = [
    "Attention",
    "Block",
    "Embedding",
    "FeedForward",
    "Head",
    "LayerNorm",
    "LayerSpec",
    "Linear",
    "Outputs",
    "Projection",
    "RMSNorm",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "canonical_name",
    "canonical_names",
    "context_for",
    "default_positions",
    "layers",
    "named_parameters",
    "parameter_shapes",
    "run_block",
]


class Transformer(nn.Module):
    """The whole model in one process."""

    def __init__(self, config: TransformerConfig, recompute: bool = False) -> None:
        """Allocate all layers, uninitialised (under `torch.device("meta")`: without storage).

        Args:
            config: shape of the model.
            recompute: keep only the input of each block for the backward pass, and compute the block again there.
        """
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        *,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """Logits: [B, T, V] of a language model, [B, C] of a classifier. Arguments are those of `outputs`."""
        found = self.outputs(tokens_BT, positions_BT, doc_ids_BT, context=context)
        return found.logits() if isinstance(found, Projection) else found

    def outputs(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        *,
        context: AttentionContext | None = None,
    ) -> Outputs:
        """What a loss is made of: the projection of a language model, logits [B, C] of a classifier.

        Args:
            tokens_BT: int64 ids below V.
            positions_BT: int64 below `max_positions`; by default 0 … T-1 in every row.
            doc_ids_BT: which tokens belong together, integers that do not fall in a row. A language model attends
                within documents, where `context` is not given. A classifier's row is one document, the tokens with the
                number of the row's first; what follows it is padding.
            context: how to attend; by default as `context_for` says.
        """
        if positions_BT is None:
            positions_BT = default_positions(tokens_BT)
        if context is None:
            context = context_for(self.config, doc_ids_BT)
        found: Outputs = self.head(self.hidden(tokens_BT, positions_BT, context), self._tied(), doc_ids_BT)
        return found

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, context: AttentionContext) -> Tensor:
        """Output of the last block, [B, T, D], before the head."""
        hidden_BTD: Tensor = self.embedding(tokens_BT, positions_BT)
        for block in self.blocks:
            hidden_BTD = run_block(block, hidden_BTD, positions_BT, context, self.recompute)
        return hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """A language model's logits [B, T', V] of any [B, T', D] taken from `hidden`."""
        projection: Projection = self.head(hidden_BTD, self._tied())
        return projection.logits()

    def _tied(self) -> Tensor | None:
        return self.embedding.weight if self.config.tie_embeddings else None


def default_positions(tokens_BT: Tensor) -> Tensor:
    """Positions 0 … T-1 in every row, int64 [B, T]."""
    num_rows, num_tokens = tokens_BT.shape
    return torch.arange(num_tokens, device=tokens_BT.device).expand(num_rows, num_tokens)


def context_for(config: TransformerConfig, doc_ids_BT: Tensor | None) -> AttentionContext:
    """How the tokens of rows attend when nothing else is asked.

    Args:
        config: shape of the model.
        doc_ids_BT: as in `Transformer.outputs`. A decoder that classifies needs no mask for them: padding comes after
            the document, and no token sees what is later.
    """
    if doc_ids_BT is None or (config.causal and config.num_labels > 0):
        return CausalContext() if config.causal else BidirectionalContext()
    return within_documents(doc_ids_BT, causal=config.causal)


def named_parameters(
    module: nn.Module, layer: LayerSpec, config: TransformerConfig
) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name, parameter) of one layer's module, wherever that module lives."""
    for local_name, parameter in module.named_parameters():
        yield canonical_name(layer, local_name, config), parameter
