"""Training: a rank of ours against a bare torch loop, plain DeepSpeed and the Hugging Face Trainer; pipelines; MFU.

    python -m benchmarks.training                      a model of 26 M parameters on one CPU thread, 5 alternating runs
    python -m benchmarks.training --gpu                a model of about 1 B in bf16 on one GPU, with MFU

`--peers FOLDER` names where `benchmarks/peers/requirements.txt` was installed (the Trainer needs `accelerate`).

Every run is a process of its own, the kinds take turns, and the median of the runs counts. All train the same shape on
rows of the same size (`benchmarks.parts.train_process`). The pipeline of two stages, one thread a rank, is held against
the time of one rank, its dearest stage's share of it, and the bubble (pp - 1) / (micro-batches + pp - 1).

Ends with one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from data_service.access import DataAccess
from data_service.plan import OrderSpec
from tests.helpers.ranks import specs_of
from trainer.architecture import TransformerConfig, layers, parameter_shapes
from trainer.config import ModelConfig, TrainConfig
from trainer.observe.peaks import mfu, peak_flops
from trainer.protocol import WorkerSpec
from trainer.stages import stage_bounds
from trainer.throughput import flops_per_token

KINDS = ("ours", "bare", "deepspeed", "trainer")
NAMES = {
    "ours": "stormjib, one rank",
    "bare": "bare torch loop",
    "deepspeed": "plain DeepSpeed, ZeRO 1",
    "trainer": "Hugging Face Trainer",
}
CPU = {"d_model": 448, "num_layers": 8, "num_heads": 7, "num_kv_heads": 7, "d_ff": 1216}
GPU = {"d_model": 2048, "num_layers": 18, "num_heads": 16, "num_kv_heads": 16, "d_ff": 5504, "tie_embeddings": False}


def spec_of(options: argparse.Namespace, folder: Path, pp: int = 1) -> WorkerSpec:
    """What every kind trains."""
    device: Literal["cpu", "cuda"] = "cuda" if options.gpu else "cpu"
    return WorkerSpec(
        attempt=1,
        rank=0,
        world_size=pp,
        dp=1,
        pp=pp,
        local_rank=0,
        device=device,
        master_addr="127.0.0.1",
        master_port=0,
        seed=1,
        seq_len=options.seq_len,
        vocab_size=32_000 if options.gpu else 16_000,
        model=ModelConfig.model_validate(GPU if options.gpu else CPU),
        train=TrainConfig.model_validate(
            {
                "parallel": {"dp": 1, "pp": pp},
                "precision": "bf16" if options.gpu else "fp32",
                "global_batch": options.rows,
                "micro_batch": options.micro_batch,
                "steps": options.steps,
                "checkpoint": {"every": 10**6, "asynchronous": False},
                "collective_timeout_s": 600,
            }
        ),
        data=DataAccess(("127.0.0.1:1",), "unused", OrderSpec(1, options.seq_len, options.rows, 2), "made"),
        checkpoints_uri=str(folder / "checkpoints"),
        resume_step=None,
        threads=options.threads,
        interface="lo",
    )


def run(kind: str, spec: WorkerSpec, folder: Path, peers: str | None) -> dict[str, Any]:
    """One run, a process for each rank; what the reporting rank says."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
    if kind == "trainer" and peers is not None:
        environment["PYTHONPATH"] = os.pathsep.join([peers, str(Path.cwd())])
    children = []
    for one in specs_of(spec):
        file = folder / f"rank{one.rank}.json"
        file.write_text(one.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.parts.train_process", kind, str(file)]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment))
    told: dict[str, Any] = {}
    try:
        for child in children:
            out, err = child.communicate(timeout=1800)
            if child.returncode:
                raise RuntimeError(f"{kind} ended with {child.returncode}: {err.decode()[-2000:]}")
            told = json.loads(out.decode().splitlines()[-1])
    finally:
        for child in children:
            child.kill()
            child.wait()
    return told


def dearest_share(spec: WorkerSpec, shape: TransformerConfig) -> float:
    """Part of a model's multiplications that its dearest stage has."""
    shapes = parameter_shapes(shape)
    block = sum(
        rows * columns for name, (rows, *more) in shapes.items() if name.startswith("blocks.0.") for columns in more
    )
    head = shape.vocab_size * shape.d_model
    bounds, held = stage_bounds(shape, spec.pp), layers(shape)
    costs = [
        sum(block if one.kind == "block" else head if one.kind == "head" else 0 for one in held[first:stop])
        for first, stop in zip(bounds, bounds[1:], strict=False)
    ]
    return max(costs) / sum(costs)


def main() -> None:
    """Measure, print the table, end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="one GPU, bf16, a model of about 1 B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of a run; the first two are not counted")
    parser.add_argument("--rows", type=int, help="of a global batch")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--peers", help="folder that the peers were installed in")
    parser.add_argument("--no-pipeline", action="store_true")
    options = parser.parse_args()
    options.rows = options.rows or (32 if options.gpu else 8)
    options.micro_batch = options.micro_batch or (8 if options.gpu else 2)
    options.seq_len = options.seq_len or (2048 if options.gpu else 128)
    with tempfile.TemporaryDirectory(prefix="stormjib-bench-") as name:
        measure(options, Path(name))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """All runs of all kinds, in turns."""
    spec = spec_of(options, folder)
    shape = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)
    tokens = options.rows * options.seq_len
    seconds: dict[str, list[float]] = {kind: [] for kind in options.kinds}
    missing: dict[str, str] = {}
    piped = spec_of(options, folder, pp=2)
    pipeline: list[float] = []
    for _ in range(options.repeats):
        for kind in options.kinds:
            if kind not in missing:
                told = run(kind, spec, folder, options.peers)
                if "missing" in told:
                    missing[kind] = told["missing"]
                else:
                    seconds[kind].append(told["step_s"])
        if not (options.no_pipeline or options.gpu):
            pipeline.append(run("ours", piped, folder, None)["step_s"])
    medians = {kind: statistics.median(found) for kind, found in seconds.items() if found}
    device = _gpu_name() if options.gpu else ""
    peak = peak_flops(device, "bf16", None) if options.gpu else None
    where = device or f"{platform.processor() or platform.machine()}, {options.threads} thread(s)"
    print(f"{shape.num_parameters:,} parameters, {spec.train.precision}, {tokens:,} tokens a step, {where}")
    print(f"{'':28}{'s/step':>9}{'spread':>15}{'tokens/s':>11}{'ours/this':>11}{'MFU':>8}")
    figures: dict[str, Any] = {}
    for kind in options.kinds:
        if kind in missing:
            print(f"{NAMES[kind]:28}not installed: {missing[kind]}")
            continue
        found, middle = seconds[kind], medians[kind]
        ratio = middle / medians["ours"] if "ours" in medians else None
        used = mfu(tokens / middle, flops_per_token(shape, options.seq_len), 1, peak) if peak else None
        figures[kind] = {
            "step_s": middle,
            "runs_s": found,
            "tokens_per_s": tokens / middle,
            "ours_over": ratio,
            "mfu": used,
        }
        spread = f"{min(found):.3f}-{max(found):.3f}"
        print(
            f"{NAMES[kind]:28}{middle:>9.3f}{spread:>15}{tokens / middle:>11,.0f}"
            f"{'' if ratio is None else format(ratio, '.3f'):>11}{'' if used is None else format(used, '.1%'):>8}"
        )
    if pipeline and "ours" in medians:
        micro_batches = options.rows // options.micro_batch
        share = dearest_share(replace(piped, rank=0), shape)
        expected = medians["ours"] * share * (micro_batches + 1) / micro_batches
        middle = statistics.median(pipeline)
        figures["pipeline"] = {
            "step_s": middle,
            "runs_s": pipeline,
            "expected_s": expected,
            "efficiency": expected / middle,
            "bubble": 1 / (micro_batches + 1),
        }
        print(
            f"{'two stages, a thread each':28}{middle:>9.3f}   bubble {1 / (micro_batches + 1):.0%}, dearest stage "
            f"{share:.0%}: {expected:.3f} s expected, {expected / middle:.2f} of it reached"
        )
    told = {"parameters": shape.num_parameters, "device": where, "missing": missing, **figures}
    print(json.dumps({"benchmark": "training", "repeats": options.repeats, **told}))


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name(0))


if __name__ == "__main__":
    main()
