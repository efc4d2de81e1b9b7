"""`stormjib plan FILE`: every legal layout of a run with memory, traffic and estimated speed; advice on the data."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.commands.arguments import add_run_file, config_of
from cluster.config import RunConfig
from data_service.errors import ConfigError

if TYPE_CHECKING:
    from data_service.manifest import DatasetManifest
    from data_service.plan import Plan
    from trainer.planner.rows import PlanRow, PlanTask

__all__ = ["add_arguments", "execute"]

_SHOWN_ROWS = 12
_OFFLOAD = {(False, False): "-", (True, False): "optimizer", (False, True): "weights", (True, True): "both"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, overrides, what the devices are, and --json."""
    add_run_file(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object with every row instead of text")
    parser.add_argument("--all", action="store_true", help=f"show every row, not the best {_SHOWN_ROWS}")
    parser.add_argument(
        "--gpu", metavar="NAME", help="the GPU of the slots, for example H100; by default this machine's"
    )
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of one rank's device")
    parser.add_argument("--efficiency", type=float, metavar="SHARE", help="share of the peak that training reaches")
    parser.add_argument("--measure", action="store_true", help="measure this CPU's peak with a matrix product")


def execute(arguments: argparse.Namespace) -> int:
    """Print the plan; exit 2 where the run does not fit."""
    from cluster.chaining import peek_base
    from cluster.planning import check_fits, num_labels, plan_task, unplanned
    from trainer.planner.rows import plan_rows, row_of, wanted_setting

    config = peek_base(config_of(arguments))
    dataset = _prepared(config)
    vocab_size = _vocab_size(config) if dataset is None else dataset.vocab_size
    task = plan_task(
        config,
        vocab_size,
        num_labels(config, dataset),
        gpu=arguments.gpu,
        memory_gib=arguments.memory_gib,
        efficiency=arguments.efficiency,
        measure=arguments.measure,
    )
    rows, note = plan_rows(task), unplanned(config)
    refusal: ConfigError | None = None
    chosen = row_of(task, wanted_setting(task))
    if note is None:
        try:
            chosen = check_fits(task)
        except ConfigError as error:
            refusal = error
    data = None if dataset is None else _data(config, dataset)
    advice = [] if dataset is None or data is None else _advice(config, dataset, task, data["epochs"])
    if arguments.json:
        told = {
            "run": _as_json(chosen),
            "rows": [_as_json(row) for row in rows],
            "parameters": task.model.num_parameters,
            "vocab_size": vocab_size,
            "device": {
                "kind": task.device,
                "memory_bytes": chosen.device_limit,
                "host_bytes": chosen.host_limit,
                **asdict(task.speed),
            },
            "precision": task.precision,
            "data": data,
            "advice": advice,
            "note": note,
            "refused": None if refusal is None else str(refusal),
        }
        print(json.dumps(told))
        return 0 if refusal is None else refusal.exit_code
    _print_run(task, chosen, vocab_size)
    if note is not None:
        print(f"note: {note}. `stormjib train` refuses nothing for its size here.")
    _print_rows(rows, chosen, most=len(rows) if arguments.all else _SHOWN_ROWS)
    _print_data(config, data)
    for line in advice:
        print(line)
    if refusal is not None:
        raise refusal
    return 0


def _print_run(task: "PlanTask", row: "PlanRow", vocab_size: int) -> None:
    from cluster.planning import gib

    setting, layout = row.setting, row.layout
    print(
        f"mesh: dp {setting.dp} x pp {setting.pp} on {task.slots} slots, ZeRO {setting.zero_stage}, {task.precision}, "
        f"{task.device}"
    )
    print(f"model: {task.model.family}, {task.model.num_parameters:,} parameters, vocabulary {vocab_size:,}")
    print(
        f"step: {task.train.global_batch * task.seq_len:,} tokens, {layout.num_micro_batches} micro-batches of "
        f"{layout.micro_batch} rows a rank, {layout.num_slots - task.train.global_batch} masked rows, pipeline bubble "
        f"{row.bubble:.0%}"
    )
    for one in row.memory:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in one.parts.items() if size >= 2**20)
        host = f"; in host memory {gib(one.host_total)}" if one.host else ""
        print(f"stage {one.stage}: a rank takes {gib(one.total)} at most (in the {one.moment}): {parts}{host}")
    sent = ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in row.traffic.items() if size)
    print(f"traffic: a rank sends in a step {sent or 'nothing'}")
    share = f"{task.speed.efficiency:.0%} of {task.speed.peak_flops / 1e12:,.3g} TFLOP/s"
    print(
        f"estimate: {row.step.tokens_per_s:,.0f} tokens/s at {share} a rank ({task.speed.source}); limited by "
        f"{row.limit}"
    )


def _print_rows(rows: "list[PlanRow]", chosen: "PlanRow", most: int) -> None:
    """The first rows, and behind them that of the run where it is none of them."""
    shown = rows[:most] + [row for row in rows[most:] if row.setting == chosen.setting]
    print(f"rows: {len(shown)} of {len(rows)} legal, the fastest that fit first; speeds are estimates")
    print(f"{'dp':>4} {'pp':>3} {'ZeRO':>4} {'micro':>5} {'recompute':>9} {'offload':>9} {'GiB':>8} {'bubble':>6} "
          f"{'sent GiB':>8} {'tokens/s':>11}  limit")  # fmt: skip
    for row in shown:
        setting = row.setting
        offload = _OFFLOAD[setting.offload_optimizer, setting.offload_parameters]
        sent = sum(row.traffic.values()) / 2**30
        print(
            f"{setting.dp:>4} {setting.pp:>3} {setting.zero_stage:>4} {row.layout.micro_batch:>5} "
            f"{'blocks' if setting.recompute else '-':>9} {offload:>9} {row.peak_bytes / 2**30:>8.2f} "
            f"{row.bubble:>6.0%} {sent:>8.2f} {row.step.tokens_per_s:>11,.0f}  {row.limit}"
            f"{'' if row.fits else ': does not fit'}{'  <- the run' if setting == chosen.setting else ''}"
        )


def _print_data(config: RunConfig, data: dict[str, Any] | None) -> None:
    if data is None:
        print("data: not prepared yet; `stormjib prepare` tells rows and epochs")
        return
    print(
        f"data: {data['rows']:,} rows of {config.data.seq_len:,} tokens, {data['batches']:,} global batches an epoch; "
        f"{config.train.steps:,} steps are {data['epochs']:.2f} epochs"
    )
    for name, epochs in data["sources"].items():
        print(f"source {name}: {epochs:.2f} epochs")


def _as_json(row: "PlanRow") -> dict[str, Any]:
    return {
        "keys": row.keys,
        **asdict(row.setting),
        "micro_batch": row.layout.micro_batch,
        "num_micro_batches": row.layout.num_micro_batches,
        "masked_rows": row.layout.num_slots - row.layout.global_batch,
        "bubble": row.bubble,
        "traffic_bytes": row.traffic,
        "stages": [{**asdict(one), "total": one.total, "host_total": one.host_total} for one in row.memory],
        "peak_bytes": row.peak_bytes,
        "host_bytes": row.host_bytes,
        "estimate": {**asdict(row.step), "step_s": row.step.step_s},
        "fits": row.fits,
        "limit": row.limit,
    }


def _advice(config: RunConfig, dataset: "DatasetManifest", task: "PlanTask", epochs: float) -> list[str]:
    from trainer.planner.advice import DataFacts, advise

    return advise(
        DataFacts(
            tokens=dataset.num_tokens("train"),
            documents=dataset.num_documents("train"),
            epochs=epochs,
            labels=len(dataset.labels),
            chats=dataset.loss_masks,
            task=config.train.task,
            family=task.model.family,
            parameters=task.model.num_parameters,
            pretrained=config.model.from_ is not None,
            tokens_seen=config.train.steps * config.train.global_batch * config.data.seq_len,
        )
    )


def _prepared(config: RunConfig) -> "DatasetManifest | None":
    """The generation that the run would read; None before it is prepared."""
    from cluster.run_data import dataset_of_run
    from data_service.manifest import read_manifests

    found = read_manifests(config.dataset_uri)
    return dataset_of_run(config, found[-1]) if found else None


def _data(config: RunConfig, dataset: "DatasetManifest") -> dict[str, Any]:
    """Rows, batches and epochs of the run: over all sources, and of each with its weights."""
    from cluster.run_data import train_plan

    plan = train_plan(config, dataset)
    stop = plan.batch_at(config.train.steps - 1) + 1
    drawn = [0.0] * plan.num_sources
    for segment, after in zip(plan.segments, [*plan.segments[1:], None], strict=True):
        end = stop if after is None else min(stop, after.first_batch)
        rows = plan.global_batch * _consumed(plan, segment.first_batch, end)
        for number, weight in enumerate(segment.weights):
            drawn[number] += rows * weight / sum(segment.weights)
    sizes = [sum(plan.parts[part].num_rows for part in parts) for _, parts in plan.sources]
    return {
        "rows": plan.num_rows,
        "batches": plan.num_batches,
        "epochs": config.train.steps * plan.global_batch / plan.num_rows,
        "sources": {name: drawn[number] / sizes[number] for number, (name, _) in enumerate(plan.sources)},
    }


def _consumed(plan: "Plan", first: int, end: int) -> int:
    """Global batches of [first, end) that are not skipped."""
    skipped = sum(max(0, min(end, last) - max(first, begin)) for begin, last in plan.skip)
    return max(0, end - first - skipped)


def _vocab_size(config: RunConfig) -> int:
    """Of the tokenizer as it is asked for."""
    from data_service.tokenizer import read_tokenizer

    wanted = config.data.tokenizer.to_train
    if wanted is not None:
        return wanted.vocab_size
    assert config.data.tokenizer.path is not None, "a tokenizer is trained or read"
    return int(read_tokenizer(config.data.tokenizer.path).vocab_size)
