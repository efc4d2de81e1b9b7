"""From the model's list of layers to pipeline stages.

Owns the modules that carry the tuple (hidden, positions[, doc_ids]) between stages, and which canonical parameters a
stage holds; where to cut is decided in `trainer.stages`. Tied embeddings live on the first and on the last stage; the
first stage's copy is the one that is counted, clipped and written. Refuses to know of optimizers or data.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from deepspeed.pipe import LayerSpec as StageLayer
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn
from torch import distributed as dist

from trainer.attention import AttentionContext
from trainer.model import (
    Block,
    Embedding,
    Head,
    LayerSpec,
    Projection,
    TransformerConfig,
    context_for,
    layers,
    named_parameters,
    run_block,
)
from trainer.stages import NamedParameter
from trainer.tasks.base import Outputs, Targets, Task

__all__ = [
    "BlockLayer",
    "EmbeddingLayer",
    "HeadLayer",
    "NamedParameter",
    "StagePipeline",
    "State",
    "build_pipeline",
]

_log = logging.getLogger(__name__)

State = tuple[Tensor, ...]
"""What flows between stages: hidden [B, T, D] (token ids [B, T] before the embedding), positions [B, T] int64, and
where attention stays within documents doc_ids [B, T] int64."""
Inner = tuple[Tensor, Tensor, AttentionContext, Tensor | None]
"""What flows between the layers of a stage: hidden, positions and doc_ids as in `State`, and how its blocks attend."""

_TIED = "embedding"


class BlockLayer(nn.Module):
    """A block in a pipeline."""

    def __init__(self, config: TransformerConfig, index: int, recompute: bool) -> None:
        """Allocate block `index`, uninitialised; see `trainer.layers.run_block` for `recompute`."""
        super().__init__()
        self.layer = Block(config, index)
        self._recompute = recompute

    def forward(self, inner: Inner) -> Inner:
        """Advance the hidden states; the rest passes through."""
        hidden_BTD, positions_BT, context, doc_ids_BT = inner
        hidden_BTD = run_block(self.layer, hidden_BTD, positions_BT, context, self._recompute)
        return hidden_BTD, positions_BT, context, doc_ids_BT


class HeadLayer(nn.Module):
    """The end of a pipeline: the model's outputs, or, with tied embeddings, what the tied matrix is applied to."""

    def __init__(self, config: TransformerConfig) -> None:
        """Allocate the head, uninitialised."""
        super().__init__()
        self.tied = config.tie_embeddings
        self.layer = Head(config)

    def forward(self, inner: Inner) -> Outputs:
        """Returns what `Transformer.outputs` does, or normalised hidden states [B, T, D] where embeddings are tied."""
        hidden_BTD, _, _, doc_ids_BT = inner
        if self.tied:
            return self.layer.normed(hidden_BTD)
        outputs: Outputs = self.layer(hidden_BTD, None, doc_ids_BT)
        return outputs


class EmbeddingLayer(nn.Module):
    """The start of a pipeline where embeddings are not tied."""

    def __init__(self, config: TransformerConfig) -> None:
        """Allocate the embedding, uninitialised."""
        super().__init__()
        self.layer = Embedding(config)

    def forward(self, inner: Inner) -> Inner:
        """Replace token ids by vectors."""
        return _embed(self.layer, inner)


def _embed(embedding: Embedding, inner: Inner) -> Inner:
    tokens_BT, positions_BT, context, doc_ids_BT = inner
    return embedding(tokens_BT, positions_BT), positions_BT, context, doc_ids_BT


def _project(embedding: Embedding, normed_BTD: Tensor) -> Projection:
    return Projection(normed_BTD, embedding.weight)


def _reduce_ties(engine: PipelineEngine) -> None:
    """Replaces `PipelineEngine._exec_reduce_tied_grads`; see `StagePipeline._schedule_exact_ties`."""
    pipeline: StagePipeline = engine.module
    for weight, _ in pipeline.get_tied_weights_and_groups():
        if not weight.requires_grad:
            continue  # frozen under adapters
        gradient = weight._hp_grad if engine.using_bf16_optimizer else weight.grad
        dist.all_reduce(gradient, group=pipeline._tied_group)
        if engine.grid.get_data_parallel_id() != 0:
            gradient.zero_()


class StagePipeline(PipelineModule):  # type: ignore[misc]  # deepspeed ships no types
    """This rank's stage, with the canonical names of its parameters."""

    def __init__(self, config: TransformerConfig, dp: int, bounds: Sequence[int], task: Task, recompute: bool) -> None:
        """Build the stage of this rank, cut by `bounds`. A collective: every rank of the world calls it.

        Consecutive ranks form one pipeline (`data` is the outer axis), so that a node that is lost takes whole
        pipelines with it and not every copy of one stage.
        """
        self._config = config
        self._bounds = tuple(bounds)
        pp = len(bounds) - 1
        specs: list[StageLayer] = []
        for layer in layers(config):
            if layer.kind == "block":
                specs.append(StageLayer(BlockLayer, config, layer.index, recompute))
            elif layer.kind == "head":
                specs.append(StageLayer(HeadLayer, config))
                if config.tie_embeddings:
                    specs.append(TiedLayerSpec(_TIED, Embedding, config, matrix_only=True, forward_fn=_project))
            elif config.tie_embeddings:
                specs.append(TiedLayerSpec(_TIED, Embedding, config, forward_fn=_embed))
            else:
                specs.append(StageLayer(EmbeddingLayer, config))
        super().__init__(
            layers=specs,
            topology=ProcessTopology(axes=["data", "pipe"], dims=[dp, pp]),
            loss_fn=self._loss,
        )
        self._task = task
        self._observe: Callable[[Outputs, Targets], None] | None = None
        self._begin_backward: Callable[[], None] | None = None
        holders = [rank for rank in range(dp * pp) if rank % pp in (0, pp - 1)]
        self._tied_group = dist.new_group(holders) if config.tie_embeddings else None

    def forward(self, state: State) -> State | Outputs:
        """This stage's layers on one micro-batch; its mask is made once for all of them.

        Args:
            state: as the stage before sends it; in the first stage the inputs of a micro-batch.

        Returns:
            The state for the next stage; in the last stage what `Transformer.outputs` returns.
        """
        _, positions_BT, *documents = state
        doc_ids_BT = documents[0] if documents else None
        context = context_for(self._config, doc_ids_BT)
        out: Inner | Outputs = super().forward((state[0], positions_BT, context, doc_ids_BT))
        return (out[0], positions_BT, *documents) if isinstance(out, tuple) else out

    def _partition_layers(self, method: str = "parameters") -> None:
        """Cut by our own bounds (overrides DeepSpeed 0.19.8, which balances parameter counts and prints them)."""
        self.parts = [*self._bounds[:-1], len(self._layer_specs)]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @contextlib.contextmanager
    def observed_by(self, observe: Callable[[Outputs, Targets], None] | None) -> Iterator[None]:
        """Inside, `observe` sees the outputs and targets of every micro-batch; on the last stage alone."""
        self._observe = observe
        try:
            yield
        finally:
            self._observe = None

    def _loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        if self._observe is not None:
            with torch.no_grad():
                self._observe(outputs, targets)
        loss = self._task.loss(outputs, targets)
        if isinstance(outputs, Projection) and loss.requires_grad and self._begin_backward is not None:
            begin = self._begin_backward
            loss.register_hook(lambda _: begin())  # type: ignore[no-untyped-call]
        return loss

    def join(self, engine: PipelineEngine) -> None:
        """Fit an engine of this pipeline to it; call it once, when the engine is built.

        DeepSpeed 0.19.8 prepares a backward pass (under bf16 it clears the gradients of the micro-batch before) when
        the first gradient reaches an output tensor of `forward`. It looks for tensors in tuples, lists and dicts, and
        finds none in a `Projection`; the hook is on the loss then, where the backward pass begins.
        """
        self._begin_backward = engine._backward_prologue
        self._schedule_exact_ties(engine)

    def _schedule_exact_ties(self, engine: PipelineEngine) -> None:
        """Make an engine of this pipeline reduce tied gradients so that both copies get the same bits.

        DeepSpeed 0.19.8 adds the two stages' gradients in each pipeline and then averages over dp, each stage in its
        own buffer. From three pipelines on, a collective adds in an order that depends on the place in the buffer, and
        the copies drift apart by rounding. Here one sum over all holders of the matrix comes first, and only dp index 0
        takes it into the average: adding zeros is exact in any order.
        """
        if self._tied_group is not None:
            engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: _reduce_ties}

    def add_filler(self) -> nn.Parameter:
        """A parameter of one element that nothing computes with; it belongs to no layer and has no name."""
        filler = nn.Parameter(torch.zeros(1))
        self.register_parameter(f"filler_{len(self._parameters)}", filler)
        return filler

    def named_model_parameters(self) -> Iterator[NamedParameter]:
        """Every parameter of this stage, in the order of the layers."""
        first, last = self.stage_id == 0, self.stage_id == self.num_stages - 1
        specs: Sequence[LayerSpec] = layers(self._config)
        for index in range(self._bounds[self.stage_id], self._bounds[self.stage_id + 1]):
            if specs[index].kind == "embedding" and self._config.tie_embeddings:
                continue
            inner = getattr(self, str(index)).layer
            for name, parameter in named_parameters(inner, specs[index], self._config):
                yield NamedParameter(name, parameter, counted=True)
        if self._config.tie_embeddings and (first or last):
            embedding = self.tied_modules[_TIED]
            for name, parameter in named_parameters(embedding, specs[0], self._config):
                yield NamedParameter(name, parameter, counted=first)


def build_pipeline(
    config: TransformerConfig, dp: int, bounds: Sequence[int], task: Task, recompute: bool
) -> StagePipeline:
    """Build this rank's stage without DeepSpeed's prints. A collective: every rank of the world calls it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        pipeline = StagePipeline(config, dp, bounds, task, recompute)
    _log.debug("deepspeed: %s", said.getvalue().strip())
    return pipeline
