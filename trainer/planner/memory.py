"""Memory of one rank, part by part, at the moment when it needs most. Pure arithmetic; loads no torch.

States follow from what DeepSpeed 0.19.8 keeps (`runtime/zero/stage_1_and_2.py`, `stage3.py`, `bf16_optimizer.py`) and
from Rajbhandari et al. 2020, section 3; activations from `trainer.planner.activations`. A step has three moments that
may need most: the backward pass of the last micro-batch, the reduction behind it, and the update. The plan tells the
parts of the worst one.

On CPUs memory is what the process holds, and the C library keeps part of what was freed; on GPUs it is what torch's
allocator gives out. CUDA's own context (some 0.5 GiB) comes on top of that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from trainer.architecture import TransformerConfig, layers, parameter_shapes
from trainer.deepspeed_config import working_stage
from trainer.planner.activations import (
    block_pieces,
    chunk_logits_bytes,
    edge_pieces,
    mask_bytes,
    output_gradient_bytes,
    total_bytes,
)
from trainer.topology import BatchLayout

__all__ = ["PARTS", "RankMemory", "Setting", "StageShape", "rank_memory", "stage_shapes"]

PARTS = (
    "weights",
    "gradients",
    "masters",
    "moments",
    "activations",
    "logits",
    "communication",
    "data",
    "checkpoint",
    "allocator",
)
"""Every part of a rank's memory, in the order in which it is told."""

_FP32 = 4
_BUCKET_ELEMENTS = 50_000_000
"""Elements of a reduction (`trainer.deepspeed_config`)."""
_ENGINE_BUCKET_ELEMENTS = 500_000_000
"""Elements that DeepSpeed's engine copies at a time where it reduces gradients itself (`runtime/engine.py`)."""
_LIVE_ELEMENTS = 100_000_000
"""Elements of gathered weights under ZeRO 3 (`trainer.deepspeed_config`)."""
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Logits of the loss's chunks (`trainer.losses`)."""
_HEAP_BLOCK = 32 * 2**20
"""glibc keeps freed blocks up to this size in its heap (mallopt(3), M_MMAP_THRESHOLD); larger ones go back."""
_HEAP_HOLES = 0.6
"""Holes of a heap for what it holds at most. Knuth's fifty-percent rule (The Art of Computer Programming 1, section
2.5) says a half; tensors are aligned to 64 bytes, and a hole of their own size is too small for glibc before 2.38."""
_LIBRARIES = 48 * 2**20
"""What libraries take in the first step: kernels of oneDNN, buffers of MKL and of gloo."""

Precision = Literal["fp32", "bf16", "fp16"]
Moment = Literal["backward", "reduction", "update"]


@dataclass(frozen=True)
class Setting:
    """What a row of the plan chooses."""

    dp: int
    pp: int
    zero_stage: int
    micro_batch: int
    recompute: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class StageShape:
    """What one pipeline stage holds."""

    blocks: int
    has_embedding: bool
    has_output: bool
    parameters: int
    """A tied matrix counts on both stages that hold it."""
    largest: int
    """Elements of its largest parameter."""
    small: int
    """Elements of the parameters whose fp32 gradients stay in the C library's heap."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    stage: int
    moment: Moment
    """When it needs most."""
    parts: Mapping[str, int]
    """On the device that computes, by `PARTS`."""
    host: Mapping[str, int] = field(default_factory=dict)
    """In the host's memory beside a GPU."""

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> int:
        """In the host's memory."""
        return sum(self.host.values())


def stage_shapes(config: TransformerConfig, bounds: tuple[int, ...]) -> list[StageShape]:
    """What each stage holds, from where `layers(config)` is cut (`trainer.stages.stage_bounds`)."""
    shapes, found = parameter_shapes(config), []
    for first, stop in zip(bounds, bounds[1:], strict=False):
        held = layers(config)[first:stop]
        prefixes = tuple(f"blocks.{one.index}." if one.kind == "block" else f"{one.kind}." for one in held)
        names = {name for name in shapes if name.startswith(prefixes)}
        has_output = any(one.kind == "head" for one in held)
        if config.tie_embeddings and has_output:
            names.add("embedding.weight")
        sizes = [math.prod(shapes[name]) for name in names]
        small = sum(size for size in sizes if size * _FP32 <= _HEAP_BLOCK)
        blocks = sum(one.kind == "block" for one in held)
        embedded = any(one.kind == "embedding" for one in held)
        found.append(StageShape(blocks, embedded, has_output, sum(sizes), max(sizes), small))
    return found


def rank_memory(
    config: TransformerConfig,
    setting: Setting,
    layout: BatchLayout,
    shape: StageShape,
    stage: int,
    *,
    seq_len: int,
    precision: Precision,
    device: Literal["cpu", "cuda"],
    moments: int = 2,
    isolate_documents: bool = False,
    asynchronous_saves: bool = True,
) -> RankMemory:
    """Memory of a rank of one stage.

    Args:
        config: shape of the model.
        setting: the row of the plan.
        layout: rows of the rank.
        shape: what the stage holds.
        stage: its number.
        seq_len: tokens of a row.
        precision: of the weights that compute.
        device: what computes.
        moments: fp32 states of the optimizer for each parameter: 2 for Adam, 1 for SGD with momentum.
        isolate_documents: whether attention may need a mask of [T, T].
        asynchronous_saves: whether a copy of masters and moments waits in host memory to be written.
    """
    offloaded = setting.offload_optimizer or setting.offload_parameters
    used_stage = working_stage(setting.zero_stage, setting.dp * setting.pp, precision, offloaded=offloaded)
    setting = replace(setting, zero_stage=used_stage)
    on_gpu = device == "cuda"
    element = _FP32 if precision == "fp32" else 2
    whole, share = shape.parameters, -(-shape.parameters // (setting.dp if setting.zero_stage else 1))
    zero, piped = setting.zero_stage, setting.pp > 1
    accumulates = layout.num_micro_batches > 1
    kept, at_work = _activations(config, setting, layout, shape, stage, seq_len, element, on_gpu)
    if isolate_documents:
        kept += mask_bytes(layout.micro_batch, seq_len, element)
    logits = 0
    if shape.has_output:
        logits = output_gradient_bytes(config)
        at_work += chunk_logits_bytes(config, layout.micro_batch, seq_len, _CHUNK_ELEMENTS[device])

    bucket = min(_BUCKET_ELEMENTS, whole) * _FP32
    masters = 0 if zero == 0 else share * _FP32
    states = {
        "weights": share * element + min(_LIVE_ELEMENTS, whole) * element if zero == 3 else whole * element,
        "masters": masters,
        "moments": share * _FP32 * moments,
        "data": 2 * layout.slots_per_rank * (seq_len + 1) * 8,
    }
    saved = (1 + moments) * _FP32 * (share if zero else -(-whole // setting.dp)) if asynchronous_saves else 0
    grown = _gradients(setting, precision, whole, share, accumulates=accumulates)
    # moment -> (gradients, communication, activations and logits)
    transfer = 2 * layout.micro_batch * seq_len * config.d_model * element * _buffers(setting, stage, layout) * piped
    copies = bucket if setting.dp > 1 and zero and not _plain_bf16(setting, precision) else 0
    table: dict[Moment, tuple[int, int, int]] = {
        "backward": (
            grown["backward"],
            (bucket if 1 <= zero and not _plain_bf16(setting, precision) and not piped else 0) + transfer,
            kept + at_work + logits,
        ),
        "reduction": (
            grown["reduction"],
            (bucket if zero and not _plain_bf16(setting, precision) else 0) + copies + transfer,
            0,
        ),
        "update": (grown["update"], transfer, 0),
    }

    def heap(name: Moment) -> int:
        working = kept + at_work
        return 0 if on_gpu else _heap(setting, precision, shape, working, grown["backward"], name) + _LIBRARIES

    moment = max(table, key=lambda name: sum(table[name]) + heap(name))
    gradients, communication, active = table[moment]
    parts = dict.fromkeys(PARTS, 0) | states
    parts |= {"gradients": gradients, "communication": communication, "allocator": heap(moment)}
    parts["logits"] = min(active, logits)
    parts["activations"] = active - parts["logits"]
    host: dict[str, int] = {}
    if not on_gpu:
        parts["checkpoint"] = saved
        return RankMemory(stage, moment, parts)
    host["checkpoint"] = saved
    if setting.offload_optimizer:
        for name in ("masters", "moments"):
            host[name], parts[name] = parts[name], 0
        host["gradients"] = share * _FP32
    if setting.offload_parameters:
        host["weights"] = share * element
        parts["weights"] -= host["weights"]
    return RankMemory(stage, moment, parts, host)


def _plain_bf16(setting: Setting, precision: Precision) -> bool:
    """DeepSpeed's optimizer for bf16 with ZeRO 1, which keeps all fp32 gradients flat and has no bucket."""
    return precision == "bf16" and setting.zero_stage == 1 and not setting.offload_optimizer


def _buffers(setting: Setting, stage: int, layout: BatchLayout) -> int:
    """Micro-batches whose activations a stage holds at once: 1F1B (Narayanan et al. 2019, section 3.2)."""
    return min(setting.pp - stage, layout.num_micro_batches)


def _activations(
    config: TransformerConfig,
    setting: Setting,
    layout: BatchLayout,
    shape: StageShape,
    stage: int,
    seq_len: int,
    element: int,
    on_gpu: bool,
) -> tuple[int, int]:
    """Bytes kept from forward to backward, over the micro-batches in flight, and bytes at work in one block."""
    rows = layout.micro_batch
    block = total_bytes(block_pieces(config, rows, seq_len, element, on_gpu=on_gpu))
    hidden = rows * seq_len * config.d_model * element
    kept = shape.blocks * (hidden if setting.recompute else block)
    if shape.has_output:
        kept += total_bytes(edge_pieces(config, rows, seq_len, element, on_gpu=on_gpu))
    # the widest gradients of a block, while its own pieces are still there
    at_work = 2 * rows * seq_len * max(config.d_ff, config.num_heads * config.head_dim) * element
    return kept * _buffers(setting, stage, layout), at_work + (block if setting.recompute else 0)


def _gradients(setting: Setting, precision: Precision, whole: int, share: int, *, accumulates: bool) -> dict[str, int]:
    """Gradient bytes at each moment."""
    zero = setting.zero_stage
    if zero == 0:
        reduced = min(whole, _ENGINE_BUCKET_ELEMENTS) * _FP32 if setting.dp > 1 else 0
        held = whole * _FP32
        return {"backward": held if accumulates else 0, "reduction": held + reduced, "update": held}
    if _plain_bf16(setting, precision):
        flat = whole * _FP32
        reduced = min(whole, _ENGINE_BUCKET_ELEMENTS) * _FP32 if setting.dp > 1 else 0
        low = whole * 2  # those of the weights that compute: zeroed, never freed
        return {"backward": flat + low, "reduction": flat + low + reduced, "update": flat + low}
    flat = share * _FP32
    if zero == 1:
        held = whole * _FP32
        return {"backward": held if accumulates else 0, "reduction": held + flat, "update": 2 * flat}
    return {"backward": flat if accumulates or zero == 3 else 0, "reduction": 2 * flat, "update": 2 * flat}


def _heap(
    setting: Setting, precision: Precision, shape: StageShape, working: int, accumulated: int, moment: Moment
) -> int:
    """What the C library keeps beyond what is in use at the moment: freed blocks, and holes between those in use."""
    # gradients that are tensors of their own, in all and those that are there in the backward pass
    stays = setting.zero_stage == 0 or _plain_bf16(setting, precision)
    own = shape.small * (2 if _plain_bf16(setting, precision) else _FP32) if setting.zero_stage <= 1 else 0
    held = min(accumulated, own)
    largest = max(working + held, own)
    in_use = {"backward": working + held, "reduction": own, "update": own if stays else 0}[moment]
    return int(largest - in_use + _HEAP_HOLES * largest)
