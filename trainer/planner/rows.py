"""Every legal way to lay a run over its slots, each with memory, traffic, bubble and an estimate of its speed.

Owns what limits a row, which keys ask for it, and which row is taken for `auto`. Which combinations are legal is for
`trainer.config` to say: every row is one that it accepts.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from data_service.errors import ConfigError
from trainer.architecture import TransformerConfig
from trainer.config import AutoTrainConfig, TrainConfig
from trainer.deepspeed_config import resolve_precision
from trainer.planner.memory import Precision, RankMemory, Setting, StageShape, rank_memory, stage_shapes
from trainer.planner.speed import DeviceSpeed, StepEstimate, estimate_step, traffic_bytes
from trainer.stages import stage_bounds
from trainer.topology import BatchLayout

__all__ = ["Limit", "PlanRow", "PlanTask", "best_row", "plan_rows", "row_of", "wanted_setting"]

Limit = Literal["memory", "host memory", "masked rows", "bubble", "communication", "compute"]
_LARGEST_MICRO_BATCH = 64
_AS_GOOD = 0.97
_MARGIN = 0.95
"""Share of a device that a row may fill: predictions are good to a tenth, mostly on the safe side."""
_OFFLOADS = ((False, False), (True, False), (True, True))
"""Of the optimizer and of the weights."""


@dataclass(frozen=True)
class PlanTask:
    """What is to be laid out, and on what."""

    train: AutoTrainConfig
    model: TransformerConfig
    seq_len: int
    slots: int
    device: Literal["cpu", "cuda"]
    precision: Precision
    speed: DeviceSpeed
    memory_bytes: int | None = None
    """Of one rank's device, whatever the row."""
    shared_bytes: int | None = None
    """Of one machine, for all ranks together: what they compute in on CPUs, and the hosts' memory beside GPUs."""
    rank_bytes: int = 0
    """Of a rank's share of it, what its libraries take before anything else."""
    most_stages: int | None = None
    """Pipeline stages that the fewest nodes of an elastic run can hold."""
    isolate_documents: bool = False

    def device_limit(self, ranks: int) -> int | None:
        """Bytes that a rank may take where it computes; None where nobody knows: then every row fits."""
        if self.memory_bytes is not None or self.device == "cuda":
            return self.memory_bytes
        return self._share(ranks)

    def host_limit(self, ranks: int) -> int | None:
        """Bytes that a rank may take of its host beside a GPU; None where nobody knows, or there is no GPU."""
        return self._share(ranks) if self.device == "cuda" else None

    def _share(self, ranks: int) -> int | None:
        return None if self.shared_bytes is None else max(0, self.shared_bytes // ranks - self.rank_bytes)


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
    device_limit: int | None
    """Bytes that a rank may take where it computes, and of its host beside a GPU; None where nobody knows."""
    host_limit: int | None
    limit: Limit
    """What is to be mended first to go faster, or to fit at all."""
    keys: dict[str, int | str]
    """Overrides that turn the file into this row: mesh, ZeRO stage and micro-batch, and others where they differ."""

    @property
    def peak_bytes(self) -> int:
        """Of the rank that needs most."""
        return max(one.total for one in self.memory)

    @property
    def host_bytes(self) -> int:
        """Of the rank that needs most in the host's memory."""
        return max(one.host_total for one in self.memory)

    @property
    def fits(self) -> bool:
        """Whether a rank has room for it, as far as anybody knows."""
        return self.limit not in ("memory", "host memory")


def wanted_setting(task: PlanTask) -> Setting:
    """What the file asks for, `auto` resolved as a run without a planner would.

    Raises:
        ConfigError: the slots do not hold one pipeline.
    """
    train, pp = task.train, task.train.parallel.safe_pp
    if task.slots < pp:
        raise ConfigError(
            f"train.parallel.pp={pp} with {task.slots} slots: not one pipeline fits. Lower it, or add slots."
        )
    dp = task.slots // pp if train.parallel.dp == "auto" else train.parallel.dp
    layout = BatchLayout(train.global_batch, dp, pp, train.micro_batch)
    return Setting(
        dp,
        pp,
        train.zero.safe_stage,
        layout.micro_batch,
        recompute=train.recompute == "blocks",
        offload_optimizer=train.zero.offload_optimizer == "cpu",
        offload_parameters=train.zero.offload_parameters == "cpu",
    )


def plan_rows(task: PlanTask) -> list[PlanRow]:
    """Every legal row, those that fit and the fastest first; what the file asks for is always among them."""
    rows = [row_of(task, setting) for setting in _settings(task)]
    return sorted(rows, key=lambda row: (not row.fits, row.peak_bytes if not row.fits else -row.step.tokens_per_s))


def best_row(task: PlanTask, rows: Sequence[PlanRow]) -> PlanRow | None:
    """The row to take among those that keep to what the file fixes and fit; None where none does.

    Of those within 3 % of the fastest it is the plainest, and of these the one with least memory: the estimate is no
    better than that. Fixed are the mesh, the ZeRO stage, offload, recomputation and the micro-batch, each unless it is
    `auto` and the memory is known: where nobody knows it, `auto` stays what it is without a planner.
    """
    wanted = wanted_setting(task)
    known = task.device_limit(wanted.dp * wanted.pp) is not None
    kept = set(_kept(task, wanted)) if known else {wanted}
    fitting = [row for row in rows if row.fits and row.setting in kept]
    good = [row for row in fitting if row.step.tokens_per_s >= _AS_GOOD * fitting[0].step.tokens_per_s]
    return min(good, key=lambda row: (*_means(row.setting), row.peak_bytes), default=None)


def _means(setting: Setting) -> tuple[int, ...]:
    """What a layout does for memory at a price that the estimate knows least of, the worst first; less is plainer."""
    offloaded = setting.offload_optimizer + setting.offload_parameters
    return offloaded, int(setting.recompute), setting.pp, int(setting.zero_stage == 3)


def row_of(task: PlanTask, setting: Setting) -> PlanRow:
    """One row with all its figures.

    Raises:
        ConfigError: there are more stages than blocks.
    """
    layout = BatchLayout(task.train.global_batch, setting.dp, setting.pp, setting.micro_batch)
    shapes = list(_shapes(task.model, setting.pp))
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
    device_limit, host_limit = (limit(setting.dp * setting.pp) for limit in (task.device_limit, task.host_limit))
    device_fits = device_limit is None or max(one.total for one in memory) <= _MARGIN * device_limit
    host_fits = host_limit is None or max(one.host_total for one in memory) <= _MARGIN * host_limit
    return PlanRow(
        setting,
        layout,
        memory,
        bubble,
        max(traffic, key=lambda one: sum(one.values())),
        step,
        device_limit,
        host_limit,
        _limit(task, layout, step, device_fits=device_fits, host_fits=host_fits),
        _keys(task, setting),
    )


@functools.lru_cache(maxsize=256)
def _shapes(config: TransformerConfig, pp: int) -> tuple[StageShape, ...]:
    """What the stages hold, the same in many rows."""
    return tuple(stage_shapes(config, stage_bounds(config, pp)))


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


def _keys(task: PlanTask, setting: Setting) -> dict[str, int | str]:
    train = task.train
    keys: dict[str, int | str] = {
        "train.parallel.dp": setting.dp,
        "train.parallel.pp": setting.pp,
        "train.zero.stage": setting.zero_stage,
        "train.micro_batch": setting.micro_batch,
    }
    for key, now, asked in (
        ("train.recompute", train.recompute, "blocks" if setting.recompute else "none"),
        ("train.zero.offload_optimizer", train.zero.offload_optimizer, "cpu" if setting.offload_optimizer else "none"),
        (
            "train.zero.offload_parameters",
            train.zero.offload_parameters,
            "cpu" if setting.offload_parameters else "none",
        ),
    ):
        if now != asked:
            keys[key] = asked
    zero = train.zero.model_copy(update={"stage": setting.zero_stage})
    if resolve_precision(train.model_copy(update={"zero": zero}), task.device) != task.precision:
        keys["train.precision"] = task.precision  # `auto` depends on the ZeRO stage
    return keys


def _settings(task: PlanTask) -> Iterator[Setting]:
    """What the file asks for, and every other combination that `trainer.config` accepts; each once."""
    wanted, tree, seen = wanted_setting(task), task.train.model_dump(), set[Setting]()
    for setting in [wanted, *_kept(task, wanted), *_combinations(task)]:
        if setting not in seen and (setting == wanted or _is_legal(tree, _keys(task, setting))):
            seen.add(setting)
            yield setting


def _kept(task: PlanTask, wanted: Setting) -> list[Setting]:
    """Settings, legal or not, that keep to what the file fixes: what is `auto` there takes every value.

    Nothing is moved to a host unless its memory is known.
    """
    train, both = task.train, (False, True)
    movable = task.host_limit(wanted.dp * wanted.pp) is not None
    found: list[Setting] = []
    for (dp, pp), stage, again, optimizer, parameters in itertools.product(
        _kept_meshes(task, wanted),
        range(4) if train.zero.stage == "auto" else (wanted.zero_stage,),
        both if train.recompute == "auto" else (wanted.recompute,),
        both if train.zero.offload_optimizer == "auto" and movable else (wanted.offload_optimizer,),
        both if train.zero.offload_parameters == "auto" and movable else (wanted.offload_parameters,),
    ):
        layout = BatchLayout(train.global_batch, dp, pp, train.micro_batch)
        setting = Setting(dp, pp, stage, layout.micro_batch, again, optimizer, parameters)
        found += _micro_batches(task, setting) if train.micro_batch == "auto" else [setting]
    return found


def _kept_meshes(task: PlanTask, wanted: Setting) -> list[tuple[int, int]]:
    """Meshes that keep to what the file fixes: with `auto` for both degrees they use all slots."""
    parallel = task.train.parallel
    if parallel.pp != "auto":
        return [(wanted.dp, wanted.pp)]
    degrees = range(1, _most_stages(task) + 1)
    if parallel.dp != "auto":
        return [(parallel.dp, pp) for pp in degrees if parallel.dp * pp <= task.slots]
    return [(task.slots // pp, pp) for pp in degrees if task.slots % pp == 0]


def _combinations(task: PlanTask) -> Iterator[Setting]:
    """Meshes, ZeRO stages, offload, recomputation and micro-batches, legal or not; on CPUs nothing is offloaded."""
    for dp, pp in _meshes(task):
        for stage in range(4):
            for optimizer, parameters in _OFFLOADS if task.device == "cuda" else _OFFLOADS[:1]:
                for recompute in (False, True):
                    yield from _micro_batches(task, Setting(dp, pp, stage, 1, recompute, optimizer, parameters))


def _micro_batches(task: PlanTask, setting: Setting) -> list[Setting]:
    """The setting with micro-batches of powers of two rows, of all rows of a rank, and as `auto` without a planner."""
    most = min(_LARGEST_MICRO_BATCH, -(-task.train.global_batch // setting.dp))
    unplanned = BatchLayout(task.train.global_batch, setting.dp, setting.pp).micro_batch
    sizes = {unplanned, *(min(most, 2**power) for power in range(most.bit_length() + 1))}
    return [replace(setting, micro_batch=size) for size in sorted(sizes)]


def _is_legal(tree: dict[str, Any], keys: dict[str, int | str]) -> bool:
    """Whether the `train` section with these overrides is one."""
    changed = {**tree, "parallel": dict(tree["parallel"]), "zero": dict(tree["zero"])}
    for key, value in keys.items():
        *section, name = key.split(".")[1:]
        (changed[section[0]] if section else changed)[name] = value
    try:
        TrainConfig.model_validate(changed)
    except ValidationError:
        return False
    return True


def _most_stages(task: PlanTask) -> int:
    """Most pipeline stages: each needs a slot and a block."""
    return min(task.slots, task.model.num_layers, task.most_stages or task.slots)


def _meshes(task: PlanTask) -> Iterator[tuple[int, int]]:
    """Meshes that use all slots that they can, and as many blocks as stages at most."""
    for pp in range(1, _most_stages(task) + 1):
        dp = min(task.slots // pp, task.train.global_batch)
        if dp * pp == task.slots or pp == task.train.parallel.pp:
            yield dp, pp
    wanted = wanted_setting(task)
    yield wanted.dp, wanted.pp
