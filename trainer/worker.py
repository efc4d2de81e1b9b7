"""One rank from its specification to its last report.

Owns the order of a rank's life (import, process group, engine, load, loop) and the names of its failures. Importing
this module is cheap; `run` and `preload` import torch and DeepSpeed.
"""

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from data_service.errors import ConfigError, EmptySplitError
from trainer.errors import CollectiveTimeoutError, WorkerLostError
from trainer.protocol import RankHooks, ReadyReport, WorkerSpec

if TYPE_CHECKING:
    from trainer.batching import RowSource
    from trainer.loop import Rank

__all__ = ["open_rank", "preload", "run"]

_log = logging.getLogger(__name__)

_LAZY_MODULES = (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_folding",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.muon.original_muon",
    "torch._dynamo",
)
"""What `deepspeed.initialize` 0.19.8 would import on first use, most of its seconds."""

_LOST = ("closed by peer", "reset by peer", "connection refused", "broken pipe", "pair closure")
_LATE = ("timed out", "timeout")


def preload(device: Literal["cpu", "cuda"]) -> None:
    """Import everything a rank needs, so that a process that waits can start at once.

    Args:
        device: what the rank will run on; DeepSpeed settles on it when it is imported.
    """
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("data_service.client", "trainer.loop", *_LAZY_MODULES):
        importlib.import_module(name)


def run(spec: WorkerSpec, hooks: RankHooks) -> None:
    """Be one rank of an attempt: returns after the last report, or raises.

    A process can be a rank once: DeepSpeed cannot be set up twice. All ranks of the attempt call it.

    Args:
        spec: what to do.
        hooks: where reports go and wishes come from.

    Raises:
        TrainError: training failed; `WorkerLostError` and `CollectiveTimeoutError` where other ranks are to blame.
        DataError: rows did not come, or were not the plan's.
        CheckpointError: the checkpoint to resume from cannot be used.
        ConfigError: the specification cannot be carried out.
    """
    from data_service.client import DataClient

    client = DataClient(spec.data)
    try:
        with _named_failures(spec):
            rank = open_rank(spec, hooks, client)
            from trainer.loop import train
            from trainer.process_group import close_process_group

            train(rank)
            close_process_group()
    finally:
        client.close()


def open_rank(spec: WorkerSpec, hooks: RankHooks, client: "RowSource") -> "Rank":
    """Build one rank, load its state and report that it is ready. A collective: every rank calls it."""
    phases: dict[str, float] = {}
    with _timed(phases, "import"):
        preload(spec.device)
        import torch

        from trainer.adapters import Lora
        from trainer.deepspeed_config import resolve_precision
        from trainer.deepspeed_engine import TrainEngine
        from trainer.guard import Guard, GuardState
        from trainer.loop import Rank, load_state
        from trainer.model import TransformerConfig
        from trainer.process_group import open_process_group
        from trainer.tasks.make import make_task
        from trainer.throughput import flops_per_token
        from trainer.topology import BatchLayout, Mesh
    mesh = Mesh(spec.dp, spec.pp)
    if mesh.world_size != spec.world_size or not 0 <= spec.rank < spec.world_size:
        raise ConfigError(
            f"Rank {spec.rank} of {spec.world_size} was started for a mesh of dp {spec.dp} x pp {spec.pp}. "
            "Start dp * pp ranks, numbered from 0."
        )
    if spec.train.lora is not None and spec.base is None:
        raise ConfigError(
            f"Rank {spec.rank} was started with train.lora and not told what its adapters belong to. Give the "
            "specification `base`, as trainer.adapters.base_of names a folder."
        )
    torch.set_num_threads(spec.threads)
    if spec.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with _timed(phases, "process_group"):
        open_process_group(
            spec.rank,
            spec.world_size,
            spec.local_rank,
            (spec.master_addr, spec.master_port),
            spec.device,
            spec.interface,
            spec.train.collective_timeout_s,
        )
    with _timed(phases, "engine"):
        task = make_task(spec.train, spec.facts)
        config = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len, task.num_labels)
        lora = Lora.of(spec.train.lora, config)
        precision = resolve_precision(spec.train, spec.device)
        layout = BatchLayout(spec.train.global_batch, spec.dp, spec.pp, spec.train.micro_batch)
        device = torch.device(spec.device, spec.local_rank) if spec.device == "cuda" else torch.device("cpu")
        costs = None
        if spec.pp > 1 and spec.train.parallel.balance == "measured":
            from trainer.layer_costs import agree_on_costs  # seldom asked for

            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            again = spec.train.recompute == "blocks"
            costs = agree_on_costs(config, layout.micro_batch, spec.seq_len, device, dtype, recompute=again)
        engine = TrainEngine(spec.train, config, mesh, spec.rank, layout, device, precision, task, lora, costs)
    guard = Guard(spec.train.guard, GuardState())
    rank = Rank(spec, hooks, config, precision, engine, client, task, _has_rows(client, "eval"), guard, lora)
    with _timed(phases, "load"):
        load_state(rank)
    name = torch.cuda.get_device_name(device) if spec.device == "cuda" else ""
    hooks.report(ReadyReport(spec.rank, phases, name, precision, flops_per_token(config, spec.seq_len)))
    return rank


def _has_rows(client: "RowSource", split: Literal["train", "eval"]) -> bool:
    """Whether the dataset holds a row of a split; `data.split.eval=0` leaves nothing to evaluate on."""
    try:
        client.plan(split)
    except EmptySplitError as error:
        _log.info("no rows of split %s: %s", split, error)
        return False
    return True


@contextlib.contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - began


@contextlib.contextmanager
def _named_failures(spec: WorkerSpec) -> Iterator[None]:
    """Turn what torch says of lost peers and late collectives into our errors."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if any(sign in text for sign in _LOST):
            raise WorkerLostError(
                f"Rank {spec.rank} lost another rank: {error}. Look at the first rank that ended."
            ) from error
        if any(sign in text for sign in _LATE):
            raise CollectiveTimeoutError(
                f"Rank {spec.rank} waited longer than train.collective_timeout_s={spec.train.collective_timeout_s:g} "
                f"for the others: {error}. Look for a rank that stands still, or raise the limit."
            ) from error
        raise
