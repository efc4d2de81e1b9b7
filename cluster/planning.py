"""What the planner is asked for a run: slots, device, memory and speed, stated, of known GPUs or measured here.

Owns where each figure is from, what cannot be planned, what `auto` stands for (the layout and the micro-batch), and the
refusal of what does not fit.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Literal

from cluster.config import LaidOutConfig, RunConfig
from cluster.machine_memory import machine_bytes
from data_service.errors import ConfigError
from data_service.manifest import DatasetManifest
from trainer.architecture import TransformerConfig
from trainer.deepspeed_config import resolve_precision
from trainer.observe.peaks import known_peak, peak_flops
from trainer.planner.rows import PlanRow, PlanTask, best_row, plan_rows, row_of, wanted_setting
from trainer.planner.speed import DeviceSpeed

__all__ = ["EFFICIENCY", "check_fits", "gib", "laid_out", "num_labels", "plan_task", "unplanned"]

EFFICIENCY = {"cuda": 0.4, "cpu": 0.7}
"""Share of the peak that training is taken to reach where nobody states it: of a GPU's data sheet, or of what a matrix
product reaches on a CPU."""
_CPU_LINK_BYTES_S = 1e9
"""Gloo over loopback or a fast Ethernet, one way."""
_GPU_RESERVE = 2**30
"""CUDA's context and kernels, beside what the allocator gives out."""
_RANK_BYTES = {"cpu": 2**26, "cuda": 2**31}
"""What a rank takes of the machine's memory before its model: on CPUs beside what its nursery shares with it (45 MiB
with a tiny model); on GPUs it loads all libraries itself, and CUDA's with them (not measured)."""
_NODE_BYTES = 3 * 2**28
"""A local node: Ray's processes, the agent, the nursery (720 MiB by proportional set size, ranks beside it)."""
_HEAD_BYTES = 2**30
"""The head and the controller (850 MiB), and the system under them."""
_DATA_WORKER_BYTES = 2**27
"""A worker of the data service (90 MiB); its shards are pages of files, which give way."""


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def plan_task(
    config: RunConfig,
    vocab_size: int,
    num_labels: int | None,
    *,
    gpu: str | None = None,
    memory_gib: float | None = None,
    efficiency: float | None = None,
    measure: bool = False,
) -> PlanTask:
    """What the planner is to lay out.

    Args:
        config: the run.
        vocab_size: of the tokenizer.
        num_labels: classes of the task's head; 0 for a language model, None where nobody knows (`unplanned`).
        gpu: name of the GPU, such as H100, where this machine does not tell.
        memory_gib: of one rank's device; by default that of a known GPU, or a share of this machine's for local nodes.
        efficiency: share of the peak that training reaches; by default `EFFICIENCY`.
        measure: whether a CPU's peak is measured here by a matrix product; else 50 GFLOP/s a core are taken.

    Raises:
        ConfigError: the GPU is not known, and no memory and peak are stated.
    """
    device: Literal["cpu", "cuda"] = "cuda" if config.cluster.node.gpus and config.train.device != "cpu" else "cpu"
    precision = resolve_precision(config.train, device)
    stated = config.observe.peak_tflops
    share = efficiency if efficiency is not None else EFFICIENCY[device]
    memory = None if memory_gib is None else int(memory_gib * 2**30)
    is_here = _is_local(config)
    if device == "cuda":
        own = "" if gpu else _own_gpu()
        name, is_here = gpu or own, is_here and own != ""
        found = known_peak(name)
        if found is None and stated is None:
            raise ConfigError(
                f"the GPU {name or 'of this run'!r} is not known here. Name it (--gpu H100), or state "
                "observe.peak_tflops and --memory-gib."
            )
        flops = peak_flops(name, precision, stated)
        assert flops is not None, "a peak is known or stated"
        link = (found.link_gb_s if found else 32.0) * 1e9
        if memory is None and found is not None:
            memory = int(found.memory_gb * 1e9) - _GPU_RESERVE
        source = "observe.peak_tflops" if stated else f"{found.source}" if found else ""
        speed = DeviceSpeed(flops, share, link, is_gpu=True, source=source)
    else:
        cores = max(1, int(config.cluster.node.cpus_per_slot))
        if stated is not None:
            flops, source = stated * 1e12, "observe.peak_tflops"
        elif measure:
            flops, source = _measured_flops(cores), "a matrix product on this machine"
        else:
            flops, source = 5e10 * cores, "50 GFLOP/s a core, unmeasured (--measure)"
        speed = DeviceSpeed(flops, share, _CPU_LINK_BYTES_S, is_gpu=False, source=source)
    cluster = config.cluster
    return PlanTask(
        train=config.train,
        model=_model(config, vocab_size, num_labels),
        seq_len=config.data.seq_len,
        slots=cluster.total_slots,
        device=device,
        precision=precision,
        speed=speed,
        memory_bytes=memory,
        shared_bytes=_bytes_for_ranks(config) if is_here else None,
        rank_bytes=_RANK_BYTES[device],
        most_stages=cluster.min_nodes * cluster.node.slots if cluster.elastic else None,
        isolate_documents=config.data.isolate_documents,
    )


def check_fits(task: PlanTask) -> PlanRow:
    """The row that the run will take, `auto` resolved to the best that fits.

    Raises:
        ConfigError: it does not fit; the message names the row that would, where one does.
    """
    rows = plan_rows(task)
    chosen = best_row(task, rows)
    if chosen is not None:
        return chosen
    asked = _lacking(task, row_of(task, wanted_setting(task)))
    fitting = next((row for row in rows if row.fits), None)
    if fitting is None:
        raise ConfigError(
            f"The run does not fit: {asked}; no legal layout of this model over {task.slots} slots does. Lower "
            "data.seq_len or the model, or take more or larger devices."
        )
    keys = _written(fitting.keys)
    raise ConfigError(f"The run does not fit: {asked}. This fits, with {gib(fitting.peak_bytes)}: {keys}")


def unplanned(config: RunConfig) -> str | None:
    """Why nobody can tell whether the run fits: a sentence; None where the plan can."""
    if config.train.lora is not None:
        return "train.lora: adapters are not planned, and with all weights trained these figures are an upper bound"
    if ":" in config.train.task:
        return (
            f"train.task={config.train.task}: what a task of your own puts on the model is not known before it is "
            "loaded, and is planned as a language model's head, or as that of two classes on an encoder"
        )
    return None


def laid_out(config: RunConfig, dataset: DatasetManifest, say: Callable[[str], None]) -> LaidOutConfig:
    """The run with every `auto` of the layout decided, and the micro-batch where the memory of a rank is known.

    Where it is, they are those of the best row that fits and keeps to what the file fixes. Nothing is planned for what
    `unplanned` names, nor for GPUs that are not known here: there `auto` is `AutoTrainConfig.auto_layout`.

    Raises:
        ConfigError: the run does not fit; the message names the row that would, where one does.
    """
    safe, task, why = config.train.auto_layout, None, unplanned(config)
    if why is None:
        try:
            task = plan_task(config, dataset.vocab_size, num_labels(config, dataset))
        except ConfigError as error:
            why = str(error)
            if not safe:
                say(f"the run is not planned: {error}")
    if task is None:
        return _without_plan(config, safe, why, say)
    row = check_fits(task)
    keys = {} if row.device_limit is None else {key: row.keys[key] for key in safe}
    chosen = f"{_written(keys)}, " if keys else ""
    say(f"planned: {chosen}micro-batches of {row.layout.micro_batch} rows, at most {gib(row.peak_bytes)} a rank")
    if row.device_limit is None:
        return _without_plan(config, safe, "the memory of a rank is not known here", say)
    if config.train.micro_batch == "auto":
        keys["train.micro_batch"] = row.layout.micro_batch
    return LaidOutConfig.of(config, keys)


def _without_plan(
    config: RunConfig, safe: Mapping[str, int | str], why: str | None, say: Callable[[str], None]
) -> LaidOutConfig:
    if safe:
        say(f"auto is {_written(safe)}, as without a plan: {why}")
    return LaidOutConfig.of(config, safe)


def num_labels(config: RunConfig, dataset: DatasetManifest | None) -> int | None:
    """Classes of the task's head: of the prepared dataset, before that two for all; None where nobody knows."""
    if ":" in config.train.task:
        return None
    if config.train.task != "text_classification":
        return 0
    return 2 if dataset is None else max(2, len(dataset.labels))


def _model(config: RunConfig, vocab_size: int, labels: int | None) -> TransformerConfig:
    if labels is not None:
        return TransformerConfig.from_section(config.model, vocab_size, config.data.seq_len, labels)
    try:
        return _model(config, vocab_size, 0)
    except ConfigError:  # an encoder, or a classifier
        return _model(config, vocab_size, 2)


def _written(keys: Mapping[str, int | str]) -> str:
    """Keys as overrides."""
    return " ".join(f"{key}={value}" for key, value in keys.items())


def _lacking(task: PlanTask, row: PlanRow) -> str:
    """What a row that does not fit needs, and what is there."""
    ranks = row.setting.dp * row.setting.pp
    share = f"its share of this machine's memory, one of {ranks}, is"
    if row.limit == "host memory":
        assert row.host_limit is not None, "a limit is passed"
        return f"a rank needs {gib(row.host_bytes)} of its host's memory, and {share} {gib(row.host_limit)}"
    assert row.device_limit is not None, "a limit is passed"
    there = "its device has" if task.device == "cuda" or task.memory_bytes is not None else share
    return f"a rank needs {gib(row.peak_bytes)}, and {there} {gib(row.device_limit)}"


def _is_local(config: RunConfig) -> bool:
    """Whether the nodes will be on this machine, as `cluster.ray_session` decides."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    given = os.environ.get("RAY_ADDRESS", "")
    return config.cluster.address == "local" or (
        config.cluster.address == "auto" and not in_job and given in ("", "local")
    )


def _bytes_for_ranks(config: RunConfig) -> int:
    """This machine's memory, less what a run with local nodes takes beside its ranks."""
    cluster, service = config.cluster, config.data.service
    workers = 0 if service.address else service.workers
    stores = (cluster.nodes + 1) * cluster.object_store_bytes
    beside = _HEAD_BYTES + cluster.nodes * _NODE_BYTES + stores + workers * _DATA_WORKER_BYTES
    return max(0, machine_bytes() - beside)


def _own_gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else ""


def _measured_flops(threads: int) -> float:
    """FLOP/s of fp32 matrix products of a size that training has, best of a few, in less than a second."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = torch.ones(512, 1024), torch.ones(1024, 1024)
    best = float("inf")
    try:
        for _ in range(8):
            began = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * 512 * 1024 * 1024 / best
