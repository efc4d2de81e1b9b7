"""The training loop of one rank, readable top to bottom.

Owns the order of things in a step and when to evaluate, to write a checkpoint and to leave. Every rank runs the same
loop and takes the same turns, because each decision follows from the step number or from an agreement of all ranks.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

from data_service.cursor import Cursor
from trainer.adapters import Lora, check_base, trained_shapes
from trainer.agreement import NEVER, agree
from trainer.batching import RowSource, count_tokens, micro_batches
from trainer.checkpoint import load_ranges
from trainer.config import TrainConfig
from trainer.deepspeed_config import Precision
from trainer.deepspeed_engine import TrainEngine
from trainer.device_memory import peak_bytes
from trainer.errors import CheckpointError, CheckpointIncompleteError, LossSpikeError, NonFiniteLossError
from trainer.evaluate import evaluate, perplexity
from trainer.fragment_readers import fill_initial, load_fragments, read_fragments, wanted_ranges
from trainer.guard import Guard
from trainer.manifest import EvalRecord, TrainState, read_manifest
from trainer.model import TransformerConfig
from trainer.optim import lr_at, state_kinds
from trainer.protocol import EvalReport, FinishedReport, RankHooks, Sample, StepReport, WorkerSpec
from trainer.samples import generate_samples
from trainer.saver import CheckpointSaver
from trainer.tasks.base import Task
from trainer.tracing import StepTracer

__all__ = ["Rank", "load_state", "save", "train"]

_log = logging.getLogger(__name__)

_PACKAGES = ("deepspeed", "numpy", "pyarrow", "safetensors", "torch")


@dataclass
class Rank:
    """One rank, ready to train."""

    spec: WorkerSpec
    hooks: RankHooks
    config: TransformerConfig
    precision: Precision
    engine: TrainEngine
    client: RowSource
    task: Task
    has_eval: bool
    """Whether a held-out split exists."""
    guard: Guard
    """Judges each step."""
    lora: Lora | None = None
    """The adapters that are trained, instead of the model."""
    step: int = 0
    """Optimizer steps done."""

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for all: the last stage of dp index 0, where the loss is."""
        return self.spec.rank == self.engine.mesh.reporter

    @property
    def train_config(self) -> TrainConfig:
        """The `train` section."""
        return self.spec.train


def load_state(rank: Rank) -> None:
    """Fill the engine with initial weights or with `resume_step`. A collective: every rank calls it.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or another model's.
        CursorMismatchError: it stands in another plan of rows.
        ConfigError: it holds adapters, and the weights below them have changed.
    """
    spec, engine = rank.spec, rank.engine
    if spec.resume_step is None:
        fill_initial((*engine.views, *engine.frozen), spec.seed, rank.config, spec.model.from_, rank.lora)
        engine.refresh(optimizer_steps=0)
        return
    manifest = read_manifest(spec.checkpoints_uri, spec.resume_step)
    state = manifest.state
    if state.parameters != trained_shapes(rank.config, rank.lora) or state.lora != rank.lora:
        raise CheckpointIncompleteError(
            f"Step {state.step} in {spec.checkpoints_uri} holds another model than the `model` section describes. "
            "Resume with the run's own configuration."
        )
    if state.base is not None and spec.base is not None:
        check_base(state.base, spec.base)
    Cursor(state.plan_digest, state.consumed_batches).check(rank.client.plan("train"))
    fragments = load_ranges(spec.checkpoints_uri, manifest, wanted_ranges(engine.views))
    load_fragments(engine.views, fragments)
    fill_initial(engine.frozen, spec.seed, rank.config, spec.model.from_, rank.lora)
    engine.refresh(state.optimizer_steps)
    engine.loss_scale = state.loss_scale
    rank.guard = Guard(rank.train_config.guard, state.guard)
    rank.step = state.step


def train(rank: Rank) -> None:
    """Train from the loaded state to the last step, or to an agreed stop. A collective: every rank calls it.

    Raises:
        NonFiniteLossError: the loss or the gradient is not a number; raised on every rank alike, as is
        LossSpikeError: the loss leapt.
        DataError: rows did not come, or were not the plan's.
    """
    with _saver(rank) as saver:
        reason = _train(rank, saver)
    rank.hooks.report(FinishedReport(rank.spec.rank, rank.step, reason))


def _train(rank: Rank, saver: CheckpointSaver) -> Literal["steps", "stop"]:
    """The steps; returns why they ended."""
    engine, config = rank.engine, rank.train_config
    if rank.step == 0:
        _evaluate(rank)
    plan = rank.client.plan("train")
    tracer = StepTracer(rank.spec.rank, engine.device)
    slots = engine.layout.slots(engine.dp_index)
    stream = rank.client.stream("train", rank.step, config.steps, slots) if engine.consumes_rows else None
    stop_after = NEVER
    reason: Literal["steps", "stop"] = "steps"
    while rank.step < config.steps:
        saver.check()
        wish = rank.hooks.control()
        if wish is not None:
            stop_after = min(stop_after, wish.step)
        began = time.perf_counter()
        rows = None if stream is None else next(stream)
        data_wait_s = time.perf_counter() - began
        held = (0, 0) if rows is None else (rank.task.count(rows), count_tokens(rows))
        num_units, num_tokens = engine.global_sums(*held)
        batch = [] if rows is None else micro_batches(rank.task, rows, engine.layout, num_units, engine.device)
        lr = lr_at(rank.step, config)
        with tracer.step(rank.hooks.profile()):
            outcome = engine.train_step(batch, lr, rank.guard.admits if rank.guard.skips else None)
        rank.step += 1
        agreed = agree(engine, rows, rank.step, stop_after)
        step_s = time.perf_counter() - began
        batch_number = plan.batch_at(rank.step - 1)
        skipped = rank.guard.record(
            rank.step,
            batch_number,
            outcome.loss,
            outcome.grad_norm,
            counted=num_units > 0,
            overflowed=outcome.overflowed,
        )
        if rank.reports:
            rank.hooks.report(
                StepReport(
                    step=rank.step,
                    batch=batch_number,
                    loss=outcome.loss if num_units and math.isfinite(outcome.loss) else None,
                    tokens=num_tokens,
                    sample_hash=agreed.sample_hash,
                    lr=lr,
                    grad_norm=outcome.grad_norm if math.isfinite(outcome.grad_norm) else None,
                    step_s=step_s,
                    data_wait_s=data_wait_s,
                    memory_bytes=peak_bytes(engine.device),
                    skipped=skipped,
                )
            )
        if rank.hooks.wants_snapshot(rank.step):
            rank.hooks.snapshot(rank.step, tuple(read_fragments(engine.views)))
        last = rank.step == config.steps
        stopping = not last and agreed.stop_after <= rank.step
        evaluation = None
        if last or (config.eval.every and rank.step % config.eval.every == 0 and not stopping):
            evaluation = _evaluate(rank)
        if last or stopping or rank.step % config.checkpoint.every == 0:
            save(rank, saver, evaluation)
        if stopping:
            reason = "stop"
            break
    tracer.end()
    return reason


def save(rank: Rank, saver: CheckpointSaver, evaluation: EvalRecord | None) -> None:
    """Begin to write this rank's part of a checkpoint; once durable it is reported, and the controller commits."""
    state = _train_state(rank, evaluation) if rank.reports else None
    saver.save(rank.step, list(read_fragments(rank.engine.views)), state)


@contextlib.contextmanager
def _saver(rank: Rank) -> Iterator[CheckpointSaver]:
    """The rank's saver. Its last save is durable when the block ends well, or with a loss that all ranks agree on."""
    spec, engine = rank.spec, rank.engine
    asynchronous = rank.train_config.checkpoint.asynchronous
    saver = CheckpointSaver(
        spec.checkpoints_uri,
        spec.attempt,
        spec.rank,
        engine.device,
        rank.hooks.report,
        asynchronous=asynchronous,
        collective_timeout_s=rank.train_config.collective_timeout_s if spec.world_size > 1 else None,
    )
    saver.reserve(sum(one.numel for one in read_fragments(engine.views)))
    engine.before_update(saver.fence)
    try:
        yield saver
    except (NonFiniteLossError, LossSpikeError):
        _end_save(rank, saver)
        raise
    saver.wait(apart=True)
    saver.close()


def _end_save(rank: Rank, saver: CheckpointSaver) -> None:
    """See the last save of every rank through before the first one leaves with an error, which ends all of them.

    A collective: every rank calls it. What goes wrong is logged: the error that led here is the one to tell.
    """
    try:
        saver.wait()
    except (OSError, CheckpointError) as error:
        _log.error("the checkpoint before could not be saved: %s", error)
    try:
        rank.engine.meet()
    except RuntimeError as error:
        _log.error("the other ranks did not come to the end of their saves: %s", error)


def _evaluate(rank: Rank) -> EvalRecord | None:
    if not rank.has_eval:
        return None
    found = evaluate(rank.engine, rank.task, rank.client, rank.train_config.eval.max_batches)
    if not math.isfinite(found.loss):
        raise NonFiniteLossError(
            f"Step {rank.step}: the evaluation loss is {found.loss}. Lower train.optimizer.lr, or resume from an "
            "earlier step."
        )
    task = rank.task
    told = None if task.num_labels else perplexity(found.loss)
    record = EvalRecord(found.loss, told, found.tokens, found.metrics, metric=task.metric, better=task.better)
    samples = _samples(rank)
    if rank.reports:
        rank.hooks.report(EvalReport(rank.step, **asdict(record), samples=samples))
    return record


def _samples(rank: Rank) -> tuple[Sample, ...]:
    """What the model writes now; nothing where it is no causal language model. A collective."""
    wishes = rank.spec.samples
    if wishes is None or rank.task.num_labels or not rank.config.causal:
        return ()
    return generate_samples(rank.engine, rank.task, rank.client, wishes, rank.spec.seq_len)


def _train_state(rank: Rank, evaluation: EvalRecord | None) -> TrainState:
    spec = rank.spec
    plan = rank.client.plan("train")
    cursor = Cursor.of(plan, rank.step)
    return TrainState(
        step=rank.step,
        optimizer_steps=rank.step - rank.guard.state.skipped,
        plan_digest=cursor.plan_digest,
        consumed_batches=cursor.consumed_batches,
        dataset_digest=plan.dataset_digest,
        seed=spec.seed,
        seq_len=spec.seq_len,
        global_batch=spec.train.global_batch,
        dp=spec.dp,
        pp=spec.pp,
        zero_stage=spec.train.zero.stage,
        precision=rank.precision,
        model=asdict(rank.config),
        parameters=trained_shapes(rank.config, rank.lora),
        config={},  # a rank does not know it; who commits fills it in
        versions={name: metadata.version(name) for name in _PACKAGES},
        kinds=state_kinds(spec.train.optimizer),
        evaluation=evaluation,
        guard=rank.guard.state,
        loss_scale=rank.engine.loss_scale,
        task=spec.train.task,
        labels=spec.facts.labels if rank.task.num_labels else (),
        lora=rank.lora,
        base=rank.spec.base,
    )
