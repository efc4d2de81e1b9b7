"""Preparation: text per second against `tokenizers`' own `encode_batch`, and memory when the input grows four times.

Both get the same documents, the same tokenizer and the same cores. `encode_batch` has the texts in memory already,
takes 1,000 at a time on all threads and drops what comes out; `prepare` reads the source files, looks for duplicates,
encodes and writes shards, with one process per core. Best of `--repeats` for each, in turn. Memory is the most that the
process and its children held together (resident set), looked at 20 times a second, for the corpus and for four salted
copies.

Ends with one line of JSON.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from benchmarks.parts.corpus import build_corpus, cache_folder, salted
from data_service.config import DataConfig, SourceConfig, TokenizerConfig, TokenizerTrainConfig
from data_service.manifest import read_manifest
from data_service.mapping import ProcessMapper, num_cpus
from data_service.prepare import prepare
from data_service.readers import Record, find_files, read_records
from data_service.tokenizer import train_tokenizer, write_tokenizer

_SPAWN = multiprocessing.get_context("spawn")
_SAMPLE_EVERY = 17
_BATCH = 1000


@dataclass(frozen=True)
class Prepared:
    """One preparation."""

    wall_s: float
    cpu_s: float
    """Of the process and its children."""
    peak_bytes: int
    digest: str


def texts_of(paths: list[Path]) -> Iterator[str]:
    """The documents of the corpus, as the readers give them."""
    for file in find_files(tuple(SourceConfig(name=str(path), path=str(path)) for path in paths)):
        for record in read_records(file, 16 << 20):
            if isinstance(record, Record):
                yield record.text


def given_tokenizer(paths: list[Path]) -> Path:
    """A BPE of 16,000 entries, trained once on every 17th document and kept."""
    folder = cache_folder() / "bpe-16000"
    if not (folder / "special_tokens_map.json").exists():
        sample = [text for number, text in enumerate(texts_of(paths)) if number % _SAMPLE_EVERY == 0]
        write_tokenizer(str(folder), train_tokenizer(TokenizerTrainConfig(vocab_size=16_000), lambda: sample))
    return folder


def config_for(paths: list[Path], tokenizer: Path) -> DataConfig:
    """One source a file."""
    return DataConfig(
        sources=tuple(SourceConfig(name=path.name, path=str(path)) for path in paths),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        seq_len=1024,
    )


def _prepare(config: DataConfig, dataset: str, processes: int, answer: Any) -> None:
    began = time.perf_counter()
    with ProcessMapper(processes) as mapper:
        prepare(config, dataset, mapper=mapper)
    wall_s = time.perf_counter() - began
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    answer.send((wall_s, sum(one.ru_utime + one.ru_stime for one in used)))


def run_prepare(config: DataConfig, dataset: Path, processes: int) -> Prepared:
    """Prepare in a process of its own, watching its memory and its children's."""
    shutil.rmtree(dataset, ignore_errors=True)
    answers, answer = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_prepare, args=(config, str(dataset), processes, answer))
    process.start()
    answer.close()
    peak = 0
    main = psutil.Process(process.pid)
    while not answers.poll(0.05):
        held = 0
        try:
            for one in (main, *main.children(recursive=True)):
                held += one.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        peak = max(peak, held)
        if not process.is_alive() and not answers.poll(0):
            raise SystemExit("the preparation failed")
    wall_s, cpu_s = answers.recv()
    process.join()
    return Prepared(wall_s, cpu_s, peak, read_manifest(str(dataset)).digest)


def run_encode_batch(tokenizer: Path, texts: list[str]) -> tuple[float, float]:
    """Seconds of wall and CPU that `encode_batch` takes for all texts."""
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    wall, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), _BATCH):
        encoder.encode_batch(texts[first : first + _BATCH], add_special_tokens=False)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the best counts")
    parser.add_argument("--copies", type=int, default=4, help="how often the corpus is salted for the memory")
    parser.add_argument("--processes", type=int, default=num_cpus(), help="processes of the preparation")
    options = parser.parse_args()
    paths = build_corpus()
    tokenizer = given_tokenizer(paths)
    texts = list(texts_of(paths))
    num_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {num_bytes / 1e6:.1f} MB of text, {options.processes} processes")
    ours: list[Prepared] = []
    theirs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=cache_folder()) as folder:
        config = config_for(paths, tokenizer)
        for _ in range(options.repeats):
            theirs.append(run_encode_batch(tokenizer, texts))
            ours.append(run_prepare(config, Path(folder) / "once", options.processes))
            print(
                f"encode_batch {num_bytes / 1e6 / theirs[-1][0]:6.2f} MB/s ({theirs[-1][1]:.1f} CPU-s)   "
                f"prepare {num_bytes / 1e6 / ours[-1].wall_s:6.2f} MB/s ({ours[-1].cpu_s:.1f} CPU-s)"
            )
        texts.clear()
        one = run_prepare(config, Path(folder) / "one", 1)
        copies = salted(paths, cache_folder() / "salted", options.copies)
        many = run_prepare(config_for(copies, tokenizer), Path(folder) / "many", options.processes)
    best, reference = min(one.wall_s for one in ours), min(wall for wall, _ in theirs)
    peak = max(one.peak_bytes for one in ours)
    result = {
        "benchmark": "prepare",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "documents_mb": round(num_bytes / 1e6, 1),
        "processes": options.processes,
        "prepare_mb_per_s": round(num_bytes / 1e6 / best, 2),
        "encode_batch_mb_per_s": round(num_bytes / 1e6 / reference, 2),
        "ratio": round(reference / best, 3),
        "ratio_of_cpu_s": round(min(cpu for _, cpu in theirs) / min(one.cpu_s for one in ours), 3),
        "peak_rss_mib": round(peak / 2**20),
        "peak_rss_mib_one_process": round(one.peak_bytes / 2**20),
        f"peak_rss_mib_{options.copies}x": round(many.peak_bytes / 2**20),
        "same_bytes_with_one_process": one.digest == ours[0].digest,
    }
    print(f"memory: {peak / 2**20:,.0f} MiB, {many.peak_bytes / 2**20:,.0f} MiB with {options.copies} times the text")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
