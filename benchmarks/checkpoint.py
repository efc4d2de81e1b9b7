"""Checkpoints: what a save costs training, how fast bytes move, and how soon another mesh has loaded them.

    python -m benchmarks.checkpoint [--device cuda --precision bf16] [--layers 16 --width 512] [--pairs 5] ...

Stall: one rank trains through the product's loop and saves at every other block of `--every` steps, so that blocks with
a save and blocks without alternate. The critical path is what the rank stood still for: waiting for the save before,
copying, and the GPU's wait for the copy (`PartReport.write_s`), as a share of a block without a save. Beside it the
paired difference of block times, which has the writing thread's use of the machine in it, with its 95 % interval.

Load: two ranks (ZeRO 1, CPU) write a state, one rank and three ranks load it. DeepSpeed saves, converts to its
universal format and loads the same model on the same meshes in the same run. All files are in the page cache.

Prints tables, and ends with one line of JSON.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_service.access import DataAccess
from data_service.plan import OrderSpec
from tests.helpers.ranks import specs_of
from trainer.config import ModelConfig, TrainConfig
from trainer.manifest import commit
from trainer.protocol import PartReport, WorkerSpec, report_from_json

VOCAB = 8192
LIMIT_S = 1800.0
_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom."""


def make_spec(options: argparse.Namespace, folder: Path, dp: int, **train: Any) -> WorkerSpec:
    """Rank 0 of a mesh of dp ranks."""
    given = {"device": "cpu", "precision": "fp32", "global_batch": 12, "micro_batch": 2} | train
    order = OrderSpec(seed=1, seq_len=options.seq_len, global_batch=given["global_batch"], window_shards=1)
    return WorkerSpec(
        attempt=1,
        rank=0,
        world_size=dp,
        dp=dp,
        pp=1,
        local_rank=0,
        device=given["device"],
        master_addr="127.0.0.1",
        master_port=0,
        seed=1,
        seq_len=options.seq_len,
        vocab_size=VOCAB,
        model=ModelConfig(d_model=options.width, num_layers=options.layers, num_heads=options.width // 64 or 1),
        train=TrainConfig.model_validate({"parallel": {"dp": dp}, "zero": {"stage": 1}, **given}),
        data=DataAccess(("127.0.0.1:1",), "none", order, "made-up"),
        checkpoints_uri=str(folder / "checkpoints"),
        resume_step=None,
        threads=1 if dp > 1 else options.threads,
        interface="lo",
    )


def run_ranks(module: str, action: str, specs: Sequence[WorkerSpec], *more: str) -> list[dict[str, Any]]:
    """Run a program for each rank, and read the line of JSON that each ends with."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for spec in specs:
            file, log = Path(folder, f"{spec.rank}.json"), Path(folder, f"{spec.rank}.log")
            file.write_text(spec.to_json())
            with log.open("wb") as errors:
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, action, str(file), *more], stdout=subprocess.PIPE, stderr=errors
                    )
                )
        try:
            told = [child.communicate(timeout=LIMIT_S)[0].decode() for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
        for spec, child in zip(specs, children, strict=True):
            if child.returncode:
                raise RuntimeError(f"{module} {action} failed: {Path(folder, f'{spec.rank}.log').read_text()[-3000:]}")
        return [json.loads(one.strip().splitlines()[-1]) for one in told]


def ours(action: str, specs: Sequence[WorkerSpec]) -> list[dict[str, Any]]:
    """Ranks of ours."""
    return run_ranks("benchmarks.parts.checkpoint_rank", action, specs)


def parts_of(told: Sequence[dict[str, Any]]) -> dict[int, list[PartReport]]:
    """Reports of parts, by step."""
    found: dict[int, list[PartReport]] = {}
    for one in told:
        for part in one["parts"]:
            report = report_from_json(json.dumps(part))
            assert isinstance(report, PartReport)
            found.setdefault(report.step, []).append(report)
    return found


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean."""
    degrees = len(values) - 1
    factor = _T_95[degrees - 1] if degrees <= len(_T_95) else 1.96
    return factor * statistics.stdev(values) / math.sqrt(len(values))


def measure_stall(options: argparse.Namespace, folder: Path, asynchronous: bool) -> dict[str, float]:
    """Blocks of steps with and without a save, by turns."""
    block, pairs = options.every, options.pairs
    spec = make_spec(
        options,
        folder,
        1,
        device=options.device,
        precision=options.precision,
        global_batch=options.batch,
        micro_batch=options.batch,
        steps=2 * block * (pairs + 1),
        checkpoint={"every": 2 * block, "asynchronous": asynchronous},
    )
    (told,) = ours("train", [spec])
    at = {int(step): moment for step, moment in told["steps"].items()}
    saves = {step: part for step, (part,) in parts_of([told]).items()}
    counted = [2 * block * (pair + 1) for pair in range(pairs)]  # the block before the first save warms up
    without = [at[step + 2 * block] - at[step + block] for step in counted]
    differences = [at[step + block] - at[step] - plain for step, plain in zip(counted, without, strict=True)]
    stood = [saves[step].write_s for step in counted]
    block_s = statistics.mean(without)
    written = [saves[step].receipt.num_bytes / saves[step].total_s for step in counted]
    return {
        "step_s": block_s / block,
        "stood_s": statistics.mean(stood),
        "stood_worst_s": max(stood),
        "critical_path_pct": 100 * statistics.mean(stood) / block_s,
        "difference_pct": 100 * statistics.mean(differences) / block_s,
        "difference_95_pct": 100 * interval(differences) / block_s,
        "save_s": statistics.mean(saves[step].total_s for step in counted),
        "mb_per_s": statistics.mean(written) / 1e6,
        "part_mb": saves[counted[0]].receipt.num_bytes / 1e6,
    }


def measure_ours(options: argparse.Namespace, folder: Path, meshes: Sequence[int]) -> dict[str, Any]:
    """Two ranks save, others load."""
    spec = make_spec(options, folder, 2, steps=1, checkpoint={"every": 1, "asynchronous": False})
    told = ours("train", specs_of(spec))
    ((step, reports),) = parts_of(told).items()
    (state,) = [report.state for report in reports if report.state is not None]
    manifest = commit(spec.checkpoints_uri, step, 1, [report.receipt for report in reports], state)
    loads = {}
    for dp in meshes:
        target = replace(make_spec(options, folder, dp, steps=2), resume_step=step)
        found = ours("load", specs_of(target))
        assert {one["weights"] for one in found} == {told[0]["weights"]}, "what was loaded is not what was saved"
        loads[dp] = max(one["phases"]["load"] for one in found)
    num_bytes = sum(part.num_bytes for part in manifest.parts)
    return {"save_s": max(report.total_s for report in reports), "loads": loads, "bytes": num_bytes}


def measure_deepspeed(options: argparse.Namespace, folder: Path, meshes: Sequence[int]) -> dict[str, Any]:
    """The same with DeepSpeed's own format."""
    peer = "benchmarks.peers.deepspeed_checkpoint"
    spec, where = make_spec(options, folder, 2), str(folder / "deepspeed")
    saved = run_ranks(peer, "save", specs_of(spec), where)
    (converted,) = run_ranks(peer, "convert", [spec], where)
    loads = {}
    for dp in meshes:
        found = run_ranks(peer, "load", specs_of(make_spec(options, folder, dp)), where)
        assert {one["weights"] for one in found} == {saved[0]["weights"]}, "DeepSpeed loaded something else"
        loads[dp] = max(one["seconds"] for one in found)
    return {"save_s": max(one["seconds"] for one in saved), "convert_s": converted["seconds"], "loads": loads}


def best_of(readings: Sequence[dict[str, Any]], meshes: Sequence[int]) -> dict[str, Any]:
    """The shortest of each time."""
    best = {key: min(one[key] for one in readings) for key in readings[0] if key != "loads"}
    return best | {"loads": {dp: min(one["loads"][dp] for one in readings) for dp in meshes}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the stall; loads are on the CPU")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step while the stall is measured")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--meshes", type=int, nargs="+", default=[1, 3], metavar="DP", help="that load")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--storage", help="where to write; by default a temporary folder")
    parser.add_argument("--skip", choices=("stall", "load"), help="leave one half out")
    options = parser.parse_args()
    meshes = options.meshes
    result: dict[str, Any] = {"device": options.device, "cpu": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory(prefix="checkpoint-bench-", dir=options.storage) as made:
        if options.skip != "stall":
            result["stall"] = {}
            print(
                f"{'save':14}{'step ms':>10}{'stood ms':>10}{'critical %':>12}{'difference %':>20}{'MB':>9}{'MB/s':>8}"
            )
            for name, asynchronous in (("asynchronous", True), ("synchronous", False)):
                found = measure_stall(options, Path(made, name), asynchronous)
                result["stall"][name] = found
                difference = f"{found['difference_pct']:.2f} ± {found['difference_95_pct']:.2f}"
                print(
                    f"{name:14}{found['step_s'] * 1e3:10.1f}{found['stood_s'] * 1e3:10.1f}"
                    f"{found['critical_path_pct']:12.3f}{difference:>20}{found['part_mb']:9.0f}{found['mb_per_s']:8.0f}",
                    flush=True,
                )
        if options.skip != "load":
            readings: dict[str, list[dict[str, Any]]] = {"ours": [], "deepspeed": []}
            for turn in range(options.repeats):
                readings["ours"].append(measure_ours(options, Path(made, f"ours-{turn}"), meshes))
                readings["deepspeed"].append(measure_deepspeed(options, Path(made, f"deepspeed-{turn}"), meshes))
            mine, theirs = (best_of(readings[name], meshes) for name in ("ours", "deepspeed"))
            ratios = {dp: (theirs["convert_s"] + theirs["loads"][dp]) / mine["loads"][dp] for dp in meshes}
            result["load"] = {"ours": mine, "deepspeed": theirs, "ratio": ratios}
            print(f"\n{mine['bytes'] / 1e6:.0f} MB from dp 2 (ZeRO 1), seconds, best of {options.repeats}")
            print(f"{'':12}{'save':>8}{'convert':>9}" + "".join(f"{f'load dp {dp}':>11}" for dp in meshes))
            for name, one in (("stormjib", mine), ("DeepSpeed", theirs)):
                converted = f"{one['convert_s']:9.2f}" if "convert_s" in one else f"{'-':>9}"
                loads = "".join(f"{one['loads'][dp]:11.2f}" for dp in meshes)
                print(f"{name:12}{one['save_s']:8.2f}{converted}{loads}")
            print(f"{'ratio':29}" + "".join(f"{ratios[dp]:11.1f}" for dp in meshes) + "   (conversion + load) / load")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
