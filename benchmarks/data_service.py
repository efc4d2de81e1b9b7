"""The data service against raw Flight, litdata and Hugging Face datasets, in the same run; seek, failover, egress.

    python -m benchmarks.data_service --peers PEERS        (see benchmarks/peers/__init__.py; left out where not given)

Everybody reads rows of 1,024 tokens from the same tokens on the same machine, best of `--repeats`: an epoch at a time,
ours and raw Flight, which would be done within a tenth of a second, five.
Ours are one or two data workers and a client, each a process, over loopback: every row is looked up, gathered,
checksummed, sent, checked against the plan and copied into its batch. Raw Flight sends messages of the same size that
lie in memory, in one stream and in two.
The time of processors is that of the reading process (the trainer's share) and of the serving ones.

Prints a table, and ends with one line of JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.parts.egress import measure_egress
from benchmarks.parts.failover import measure_failover
from benchmarks.parts.seek import measure_seek
from benchmarks.parts.usage import Reading
from data_service.plan import OrderSpec
from data_service.server import MESSAGE_BYTES
from tests.helpers.data_fleet import fleet
from tests.helpers.written_datasets import WrittenDataset, WrittenPart, write_dataset

SEQ_LEN = 1024
BATCH = 64
RUN_AHEAD = 512
EPOCHS = 5
"""Read at a time by ours and raw Flight."""
NUM_WORKERS = (1, 2)
"""Settings of ours, as one and two streams are of raw Flight."""
MESSAGE_ROWS = MESSAGE_BYTES // (2 * (SEQ_LEN + 1))


def write_tokens(folder: Path, num_tokens: int) -> tuple[WrittenDataset, Path]:
    """Random documents as a dataset of ours, and the same tokens as one array for the peers."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 60_000, num_tokens).astype(np.uint16)
    ends = np.cumsum(draw.integers(100, 1200, num_tokens // 600))
    ends = ends[ends < num_tokens - 1]
    tokens[ends] = 0
    np.save(folder / "tokens.npy", tokens)
    part = WrittenPart("random", np.split(tokens, ends + 1))
    return write_dataset(folder / "dataset", {"train": [part]}, shard_tokens=1 << 20), folder / "tokens.npy"


def _run(module: str, *arguments: str, text: str = "", peers: str | None = None) -> list[Reading]:
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    if peers is not None:
        environment["PYTHONPATH"] = os.pathsep.join([peers, str(Path.cwd())])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], input=text, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stderr[-3000:]}")
    return [Reading(**one) for one in json.loads(done.stdout.strip().splitlines()[-1])]


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def _served(processes: list[psutil.Process], read: Any) -> tuple[list[Reading], float]:
    """Readings, and the serving processes' seconds of processor time per token."""
    before = _cpu_s(processes)
    readings = read()
    return readings, (_cpu_s(processes) - before) / sum(one.tokens for one in readings)


def raw_flight(num_tokens: int) -> tuple[list[Reading], float]:
    """Flight alone."""
    command = [sys.executable, "-m", "benchmarks.peers.raw_flight", "serve", str(MESSAGE_ROWS), str(SEQ_LEN)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        messages = str(EPOCHS * num_tokens // (MESSAGE_ROWS * (SEQ_LEN + 1)))
        found = _served(
            [psutil.Process(server.pid)],
            lambda: _run("benchmarks.peers.raw_flight", "read", port, messages, str(SEQ_LEN)),
        )
        server.kill()
    return found


def ours(dataset: WrittenDataset, num_tokens: int, num_workers: int) -> tuple[list[Reading], float]:
    """The data service; its first epoch, in which shards are verified, is read before."""
    steps = num_tokens // (SEQ_LEN + 1) // BATCH
    with fleet(dataset, num_workers) as running:
        order = OrderSpec(seed=1, seq_len=SEQ_LEN, global_batch=BATCH, window_shards=16)
        access = running.access(order, run_ahead=RUN_AHEAD).to_json() + "\n"
        _run("benchmarks.parts.reader", str(steps), str(BATCH), "1", text=access)
        processes = [psutil.Process(one.pid) for one in running.workers]
        arguments = (str(EPOCHS * steps), str(BATCH), "3")
        found, cost = _served(processes, lambda: _run("benchmarks.parts.reader", *arguments, text=access))
    return [replace(one, setting=f"{num_workers} workers, {one.setting}") for one in found], cost


def _line(name: str, best: Reading, served: float | None) -> None:
    served_text = "" if served is None else f"{served * 1e9:9.1f}"
    print(
        f"{name:16}{best.setting:24}{best.tokens_per_s / 1e6:9.0f}{best.tokens_per_cpu_s / 1e6:11.0f}"
        f"{1e9 / best.tokens_per_cpu_s:9.1f}{served_text:>9}"
    )


def throughput(folder: Path, dataset: WrittenDataset, tokens: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and processor time of everybody."""
    readings: dict[str, list[Reading]] = {}
    served: dict[str, list[float]] = {}
    arguments = (str(tokens), str(folder), str(SEQ_LEN), str(BATCH))
    for _ in range(options.repeats):
        for name, (found, cost) in (
            ("raw Flight", raw_flight(options.tokens)),
            *(("stormjib", ours(dataset, options.tokens, count)) for count in NUM_WORKERS),
        ):
            readings.setdefault(name, []).extend(found)
            served.setdefault(name, []).append(cost)
        if options.peers:
            for name, module in (("litdata", "litdata_tokens"), ("HF datasets", "hf_datasets")):
                found = _run(f"benchmarks.peers.{module}", *arguments, peers=options.peers)
                readings.setdefault(name, []).extend(found)
    print(f"{'':16}{'setting':24}{'M tok/s':>9}{'M/CPU-s':>11}{'CPU-s/G':>9}{'served':>9}   (CPU-s per G tokens)")
    result: dict[str, Any] = {}
    for name, found in readings.items():
        fastest = max(found, key=lambda one: one.tokens_per_s)
        leanest = max(found, key=lambda one: one.tokens_per_cpu_s)
        cost = min(served[name]) if name in served else None
        _line(name, fastest, cost)
        if leanest is not fastest:
            _line("", leanest, None)
        result[name] = {
            "tokens_per_s": fastest.tokens_per_s,
            "tokens_per_cpu_s": leanest.tokens_per_cpu_s,
            "cpu_s_per_g_token": 1e9 / leanest.tokens_per_cpu_s,
            "served_cpu_s_per_g_token": None if cost is None else cost * 1e9,
        }
    result["of_raw_flight"] = result["stormjib"]["tokens_per_s"] / result["raw Flight"]["tokens_per_s"]
    if "litdata" in result:
        result["of_litdata_per_cpu_s"] = result["stormjib"]["tokens_per_cpu_s"] / result["litdata"]["tokens_per_cpu_s"]
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the corpus (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of everything; the best counts")
    parser.add_argument("--events", type=int, default=5, help="events of each kind for the failover figure")
    parser.add_argument("--peers", help="folder that the peers were installed in")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset, tokens = write_tokens(folder, options.tokens)
        speed = throughput(folder, dataset, tokens, options)
        print(f"\nstormjib is {speed['of_raw_flight']:.0%} of raw Flight", end="")
        if "of_litdata_per_cpu_s" in speed:
            print(f", {speed['of_litdata_per_cpu_s']:.1f} times litdata's tokens per trainer CPU-second", end="")
        print()
        egress = measure_egress(dataset)
        print(f"an epoch reads {egress['read_ratio']:.3f} of the dataset from the store with 3 workers and 4 trainers")
        print(f"the controller's audit reads {egress['audit_ratio']:.3f} of it once more (data.service.audit)")
        print(f"bytes served are {egress['served_ratio']:.4f} of those consumed")
        failover = measure_failover(folder, options.events)
        for name, one in failover.items():
            print(f"added wait, {name}: p50 {one['p50_s']:.3f} s, longest {one['max_s']:.3f} s")
    seek = measure_seek()
    print(
        f"first batch after a jump in {seek['rows']:.1e} rows: p50 {seek['jump_p50_s'] * 1e3:.1f} ms, p99 "
        f"{seek['jump_p99_s'] * 1e3:.1f} ms; a new client resumes in {seek['resume_p50_s'] * 1e3:.1f} ms; cursor "
        f"{seek['cursor_bytes']} bytes, memory grew by {seek['rss_growth_bytes'] / 2**20:.1f} MiB in 50 jumps"
    )
    print(
        json.dumps(
            {
                "benchmark": "data_service",
                "machine": {
                    "cores": os.cpu_count(),
                    "platform": platform.platform(),
                    "load_1m": [load, os.getloadavg()[0]],
                },
                "throughput": speed,
                "egress": egress,
                "failover": failover,
                "seek": seek,
            }
        )
    )


if __name__ == "__main__":
    main()
