"""Every legal way to lay a run over its slots, each with memory, traffic, bubble and an estimate of its speed.

Owns which combinations are legal (as `trainer.config` says), what limits a row, and which row is taken for `auto`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from data_service.errors import ConfigError
from trainer.architecture import TransformerConfig
from trainer.config import TrainConfig
from trainer.planner.memory import Precision, RankMemory, Setting, rank_memory, stage_shapes
from trainer.planner.speed import DeviceSpeed, StepEstimate, estimate_step, traffic_bytes
from trainer.stages import stage_bounds
from trainer.topology import BatchLayout, Mesh

__all__ = ["Limit", "PlanRow", "PlanTask", "best_row", "plan_rows", "row_of", "wanted_setting"]

Limit = Literal["memory", "host memory", "masked rows", "bubble", "communication", "compute"]
_LARGEST_MICRO_BATCH = 64
_AS_GOOD = 0.97
_MARGIN = 0.95
"""Share of a device that a row may fill: predictions are good to a tenth, mostly on the safe side."""


@dataclass(frozen=True)
class PlanTask:
    """What is to be laid out, and on what."""

    train: TrainConfig
    model: TransformerConfig
    seq_len: int
    slots: int
    device: Literal["cpu", "cuda"]
    precision: Precision
    speed: DeviceSpeed
    memory_bytes: int | None = None
    """Of one rank's device; None where it is not known: then every row fits."""
    host_bytes: int | None = None
    """Of the host for one rank, beside a GPU."""
    isolate_documents: bool = False


@dataclass(frozen=True)
class PlanRow:
    """One way to lay the run out."""

    setting: Setting
    layout: BatchLayout
    memory: tuple[RankMemory, ...]
    """Of each stage's ranks."""
    bubble: float
    """Share of the compute in which a stage waits for others: (pp - 1) / (micro-batches + pp - 1)."""
    traffic: dict[str, int]
    """Bytes that a rank of the busiest stage sends in a step."""
    step: StepEstimate
    fits: bool
    limit: Limit
    """What is to be mended first to go faster, or to fit at all."""

    @property
    def peak_bytes(self) -> int:
        """Of the rank that needs most."""
        return max(one.total for one in self.memory)

    @property
    def host_bytes(self) -> int:
        """Of the rank that needs most in the host's memory."""
        return max(one.host_total for one in self.memory)

    def keys(self) -> dict[str, int | str | bool]:
        """The keys of `train` that ask for this row."""
        setting = self.setting
        return {
            "train.parallel.dp": setting.dp,
            "train.parallel.pp": setting.pp,
            "train.zero.stage": setting.zero_stage,
            "train.micro_batch": self.layout.micro_batch,
            **({"train.recompute": "blocks"} if setting.recompute else {}),
            **({"train.zero.offload_optimizer": "cpu"} if setting.offload_optimizer else {}),
            **({"train.zero.offload_parameters": "cpu"} if setting.offload_parameters else {}),
        }


def wanted_setting(task: PlanTask) -> Setting:
    """What the file asks for, `auto` resolved as a run without a planner would.

    Raises:
        ConfigError: the slots do not hold one pipeline.
    """
    train, pp = task.train, task.train.parallel.pp
    if task.slots < pp:
        raise ConfigError(
            f"train.parallel.pp={pp} with {task.slots} slots: not one pipeline fits. Lower it, or add slots."
        )
    dp = task.slots // pp if train.parallel.dp == "auto" else train.parallel.dp
    layout = BatchLayout(train.global_batch, dp, pp, train.micro_batch)
    return Setting(
        dp,
        pp,
        train.zero.stage,
        layout.micro_batch,
        recompute=train.recompute == "blocks",
        offload_optimizer=train.zero.offload_optimizer == "cpu",
        offload_parameters=train.zero.offload_parameters == "cpu",
    )


def plan_rows(task: PlanTask) -> list[PlanRow]:
    """Every legal row, those that fit and the fastest first."""
    rows = [row_of(task, setting) for setting in _settings(task)]
    return sorted(rows, key=lambda row: (not row.fits, row.peak_bytes if not row.fits else -row.step.tokens_per_s))


def best_row(task: PlanTask, rows: Sequence[PlanRow]) -> PlanRow | None:
    """The row to take among those that keep to what the file fixes and fit; None where none does.

    Of those within 3 % of the fastest it is the one with least memory: the estimate is no better than that. Fixed are
    the pipeline stages, the ZeRO stage, offload, recomputation, and dp and micro-batch unless `auto`.
    """
    wanted = wanted_setting(task)

    def keeps(row: PlanRow) -> bool:
        setting = row.setting
        return (
            setting.pp == wanted.pp
            and setting.dp == wanted.dp
            and setting.zero_stage == wanted.zero_stage
            and setting.recompute == wanted.recompute
            and setting.offload_optimizer == wanted.offload_optimizer
            and setting.offload_parameters == wanted.offload_parameters
            and (task.train.micro_batch == "auto" or setting.micro_batch == wanted.micro_batch)
        )

    fitting = [row for row in rows if row.fits and keeps(row)]
    good = [row for row in fitting if row.step.tokens_per_s >= _AS_GOOD * fitting[0].step.tokens_per_s]
    return min(good, key=lambda row: row.peak_bytes, default=None)


def row_of(task: PlanTask, setting: Setting) -> PlanRow:
    """One row with all its figures.

    Raises:
        ConfigError: there are more stages than blocks.
    """
    layout = BatchLayout(task.train.global_batch, setting.dp, setting.pp, setting.micro_batch)
    shapes = stage_shapes(task.model, stage_bounds(task.model, setting.pp))
    element = 4 if task.precision == "fp32" else 2
    optimizer = task.train.optimizer
    moments = 2 if optimizer.name != "sgd" else int(optimizer.momentum > 0)
    memory = tuple(
        rank_memory(
            task.model,
            setting,
            layout,
            shape,
            stage,
            seq_len=task.seq_len,
            precision=task.precision,
            device=task.device,
            moments=moments,
            isolate_documents=task.isolate_documents,
            asynchronous_saves=task.train.checkpoint.asynchronous,
        )
        for stage, shape in enumerate(shapes)
    )
    traffic = [traffic_bytes(task.model, setting, layout, one, task.seq_len, element) for one in shapes]
    step = estimate_step(task.model, setting, layout, shapes, task.seq_len, element, task.speed)
    bubble = (setting.pp - 1) / (layout.num_micro_batches + setting.pp - 1)
    device_fits = task.memory_bytes is None or max(one.total for one in memory) <= _MARGIN * task.memory_bytes
    host_fits = task.host_bytes is None or max(one.host_total for one in memory) <= _MARGIN * task.host_bytes
    return PlanRow(
        setting,
        layout,
        memory,
        bubble,
        max(traffic, key=lambda one: sum(one.values())),
        step,
        device_fits and host_fits,
        _limit(task, layout, step, device_fits=device_fits, host_fits=host_fits),
    )


def _limit(task: PlanTask, layout: BatchLayout, step: StepEstimate, *, device_fits: bool, host_fits: bool) -> Limit:
    """What costs most of the time that is lost, of those that cost a tenth of a step or more; else the compute."""
    if not device_fits:
        return "memory"
    if not host_fits:
        return "host memory"
    masked = 1 - task.train.global_batch / layout.num_slots
    lost: dict[Limit, float] = {
        "bubble": step.bubble_s / step.step_s,
        "communication": step.transfer_s / step.step_s,
        "masked rows": masked * step.compute_s / step.step_s,
    }
    worst = max(lost, key=lambda name: lost[name])
    return worst if lost[worst] >= 0.1 else "compute"


def _settings(task: PlanTask) -> Iterator[Setting]:
    """Every legal combination: meshes over the slots, ZeRO stages, micro-batches, recomputation, offload."""
    for dp, pp in _meshes(task):
        most = min(_LARGEST_MICRO_BATCH, -(-task.train.global_batch // dp))
        micro_batches = sorted({min(most, 2**power) for power in range(most.bit_length() + 1)})
        for stage in _zero_stages(task, pp):
            for micro_batch in micro_batches:
                for recompute in (False, True):
                    yield Setting(dp, pp, stage, micro_batch, recompute)
                    if task.device == "cuda" and stage > 0 and not (pp > 1 and task.model.tie_embeddings):
                        yield Setting(dp, pp, stage, micro_batch, recompute, offload_optimizer=True)
                        if stage == 3:
                            yield Setting(dp, pp, stage, micro_batch, recompute, True, True)


def _meshes(task: PlanTask) -> Iterator[tuple[int, int]]:
    """Meshes that use all slots that they can, and as many blocks as stages at most."""
    for pp in range(1, min(task.slots, task.model.num_layers) + 1):
        dp = min(task.slots // pp, task.train.global_batch)
        if dp * pp == task.slots or pp == task.train.parallel.pp:
            yield Mesh(dp, pp).dp, pp
    wanted = wanted_setting(task)
    if wanted.dp != min(task.slots // wanted.pp, task.train.global_batch):
        yield wanted.dp, wanted.pp


def _zero_stages(task: PlanTask, pp: int) -> tuple[int, ...]:
    """Legal ZeRO stages: 1 with a pipeline; 0 in fp32 only."""
    if pp > 1:
        return (1,)
    return (0, 1, 2, 3) if task.precision == "fp32" else (1, 2, 3)
