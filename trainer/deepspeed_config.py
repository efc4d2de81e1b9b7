"""The one place that spells DeepSpeed's keys and switches (written for 0.19.8).

Owns the configuration dictionary of an engine, the precision that `auto` stands for, the process environment DeepSpeed
reads, and the switches that keep ranks from compiling anything. Builds no engine, and loads torch for none of it.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from data_service.errors import ConfigError
from trainer.config import AutoTrainConfig, TrainConfig
from trainer.topology import BatchLayout

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "BufferSizes",
    "Precision",
    "engine_config",
    "quiet",
    "rank_environment",
    "resolve_precision",
    "switch_off_builds",
    "working_stage",
]

Precision = Literal["fp32", "bf16", "fp16"]

_BUCKET_ELEMENTS = 50_000_000
"""Most elements in one reduction or gathering; DeepSpeed allocates a pipeline's buffer anew in every step."""


_LOSS_SCALE_POWER = 16
"""The loss scale of fp16 begins at 2 to this power."""
_LOSS_SCALE_WINDOW = 1000
"""Steps without an overflow after which the loss scale doubles."""
_LIVE_ELEMENTS = 100_000_000
"""Elements of gathered weights that ZeRO 3 may keep before it releases and prefetches no more."""


def resolve_precision(train: AutoTrainConfig, device: Literal["cpu", "cuda"]) -> Precision:
    """What `train.precision` stands for: bf16 on GPUs (where ZeRO keeps fp32 masters) and fp32 elsewhere for `auto`.

    A ZeRO stage that is to be planned counts as one: with `auto` for both, the plan is for bf16 and leaves out stage 0.

    Raises:
        ConfigError: fp16 on CPUs.
    """
    if train.precision == "fp16" and device == "cpu":
        raise ConfigError("train.precision=fp16 on CPUs: fp16 is for GPUs. Set train.precision=bf16 or fp32.")
    if train.precision != "auto":
        return train.precision
    return "bf16" if device == "cuda" and train.zero.stage != 0 else "fp32"


def working_stage(stage: int, ranks: int, precision: Precision, *, offloaded: bool) -> int:
    """The ZeRO stage that an engine is built with.

    One rank in fp32 has nothing to partition and no masters beside its weights, but stages 1 and 2 would still copy all
    gradients and weights in each step (7 % of one with 26 M parameters on a CPU). Checkpoints are the same from either.

    Args:
        stage: what `train.zero.stage` says.
        ranks: of the whole mesh.
        precision: of the weights that compute.
        offloaded: whether states lie in the host's memory, which is for ZeRO to do.
    """
    alone = ranks == 1 and stage in (1, 2) and precision == "fp32" and not offloaded
    return 0 if alone else stage


@dataclass(frozen=True)
class BufferSizes:
    """What bounds DeepSpeed's buffers."""

    num_elements: int
    """Elements of the parameters that this rank's modules hold."""
    largest_vector: int
    """Elements of the largest vector (norm or bias) among them; ZeRO 3 keeps vectors whole and cuts matrices."""

    @classmethod
    def of(cls, parameters: "Iterable[nn.Parameter]") -> Self:
        """Measure parameters, before an engine has cut them."""
        held = list(parameters)
        vectors = [one.numel() for one in held if one.ndim < 2]
        return cls(sum(one.numel() for one in held), max(vectors, default=0))


def engine_config(
    train: TrainConfig,
    stage: int,
    layout: BatchLayout,
    precision: Precision,
    sizes: BufferSizes,
    *,
    on_gpu: bool = False,
) -> dict[str, Any]:
    """DeepSpeed's configuration of one rank.

    Args:
        train: the `train` section; the optimizer and the learning rate are handed over as objects, not by key.
        stage: of ZeRO, as `working_stage` says.
        layout: rows of a rank and how they are cut.
        precision: of the weights that compute; masters, accumulation and reductions are fp32 in either.
        sizes: of the parameters that this rank's modules hold.
        on_gpu: whether this rank computes on a GPU, so that pages of the host are worth pinning.
    """
    bucket = min(_BUCKET_ELEMENTS, sizes.num_elements + sizes.num_elements % 2)
    offload = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": layout.num_slots,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.num_micro_batches,
        # Without ZeRO the engine clips but does not tell the norm: there we clip ourselves.
        "gradient_clipping": train.optimizer.grad_clip if stage > 0 else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": sizes.largest_vector,
            "stage3_max_live_parameters": _LIVE_ELEMENTS,
            "stage3_max_reuse_distance": _LIVE_ELEMENTS,
            **({"offload_optimizer": offload} if train.zero.offload_optimizer == "cpu" else {}),
            **({"offload_param": offload} if train.zero.offload_parameters == "cpu" else {}),
        },
        # A torch optimizer steps on the host: DeepSpeed's own would be compiled in the ranks.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {
            "enabled": precision == "fp16",
            "initial_scale_power": _LOSS_SCALE_POWER,
            "loss_scale_window": _LOSS_SCALE_WINDOW,
        },
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": False,
    }


def rank_environment(
    rank: int, world_size: int, local_rank: int, master: tuple[str, int], device: Literal["cpu", "cuda"]
) -> Mapping[str, str]:
    """Environment variables a rank sets for itself before it imports DeepSpeed.

    They spare it the search for MPI, for accelerators and, with `numactl`, for NUMA nodes.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
        "DS_ACCELERATOR": device,
    }


def quiet() -> None:
    """Keep DeepSpeed's log lines below warnings, and torch's warnings about DeepSpeed's own calls, out of the log."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="c10d::.*an autograd kernel was not registered", category=UserWarning)


def switch_off_builds() -> None:
    """Keep DeepSpeed from compiling C++ at run time; call it before the process group is made.

    On CPUs, 0.19.8 builds `deepspeed_shm_comm` when the process group is made (37 to 98 s, and a kill during it leaves
    a lock that hangs the next start); gloo does its work. Even asking which builds are possible runs a compiler, on the
    first look at this table, so the table is put there empty.
    """
    from deepspeed import ops

    ops.__compatible_ops__ = {}
