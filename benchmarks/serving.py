"""Serving: tokens/s, time to first token and inter-token times, ours against transformers in the same run.

Three rows per number of streams: the engine in this process, the endpoint on Ray Serve through the official
asynchronous client, and `transformers.generate` on the same weights (all prompts as one static batch: the best case for
its throughput). Greedy, fp32, end token ignored, distinct prompts, same threads. Best of `--repeats` by wall time.

The endpoint sends what came within 20 ms as one event; its inter-token times are those between events, divided by the
tokens that an event holds. The wall-time ratio of 8 streams to 1 is that of the endpoint.

Ends with one line of JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import ray
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

from serve.config import ServeConfig
from serve.deployment import deploy, undeploy
from serve.engine.messages import EngineRequest
from serve.engine.sequence import SamplingParams
from serve.model_folder import read_model_folder
from serve.spec import ServeSpec
from serve.weights import build_engine
from tests.helpers.tiny_model import make_model_folder

Prompts = list[list[int]]
Runner = Callable[[Prompts], "Timing"]


@dataclass
class Timing:
    """One wave of streams."""

    wall_s: float
    ttft_s: list[float]
    itl_s: list[float]
    """One value per token after the first of each stream."""
    tokens: int


def engine_runner(folder: str, config: ServeConfig, new_tokens: int) -> Runner:
    """The engine's passes, called directly."""
    core, _ = build_engine(folder, config, "cpu")
    params = SamplingParams(new_tokens, 0.0, ignore_eos=True)

    def run(prompts: Prompts) -> Timing:
        start = time.perf_counter()
        for number, prompt in enumerate(prompts):
            core.add(EngineRequest(str(number), (tuple(prompt),), 1, params))
        times: dict[str, list[float]] = {str(number): [] for number in range(len(prompts))}
        while core.has_work:
            deltas = core.step()
            now = time.perf_counter()
            for request_id, delta in deltas:
                times[request_id] += [now] * len(delta.tokens)
        return summarise(start, list(times.values()))

    return run


def summarise(start: float, times: list[list[float]]) -> Timing:
    """From the times of the tokens of each stream."""
    return Timing(
        max(stream[-1] for stream in times) - start,
        [stream[0] - start for stream in times],
        [float(gap) for stream in times for gap in np.diff(stream)],
        sum(len(stream) for stream in times),
    )


class _Clock(StoppingCriteria):
    """Notes when each step of generate ends; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def transformers_runner(folder: str, new_tokens: int) -> Runner:
    """`generate` on all prompts as one batch of equal lengths."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(prompts: Prompts) -> Timing:
        clock = _Clock()
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        return summarise(start, [clock.times] * len(prompts))

    return run


@contextlib.contextmanager
def endpoint_runner(folder: str, config: ServeConfig, new_tokens: int) -> Iterator[Runner]:
    """The endpoint on a Ray of its own, driven by the official client."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="sj") as short:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _temp_dir=short,
        )
        try:
            endpoint = deploy(ServeSpec(folder, "bench", config=config))

            async def one(client: openai.AsyncOpenAI, prompt: list[int]) -> list[tuple[float, int]]:
                events: list[tuple[float, int]] = []
                stream = await client.completions.create(
                    model="bench",
                    prompt=prompt,
                    max_tokens=new_tokens,
                    temperature=0,
                    stream=True,
                    logprobs=0,
                    extra_body={"ignore_eos": True},
                )
                async for chunk in stream:
                    report = chunk.choices[0].logprobs
                    events.append((time.perf_counter(), len(report.tokens or []) if report else 0))
                return events

            async def wave(prompts: Prompts) -> Timing:
                async with openai.AsyncOpenAI(base_url=endpoint.url + "/v1", api_key="none") as client:
                    start = time.perf_counter()
                    streams = await asyncio.gather(*(one(client, prompt) for prompt in prompts))
                gaps = []
                for events in streams:
                    for (before, _), (now, count) in zip(events, events[1:], strict=False):
                        gaps += [(now - before) / max(count, 1)] * count
                return Timing(
                    max(events[-1][0] for events in streams) - start,
                    [events[0][0] - start for events in streams],
                    gaps,
                    sum(count for events in streams for _, count in events),
                )

            yield lambda prompts: asyncio.run(wave(prompts))
            undeploy(endpoint)
        finally:
            ray.shutdown()


def measure(run: Runner, prompts: Prompts, repeats: int) -> Timing:
    """Best of `repeats`."""
    timings = [run(prompts) for _ in range(repeats)]
    assert len({timing.tokens for timing in timings}) == 1, "every wave makes the same number of tokens"
    return min(timings, key=lambda timing: timing.wall_s)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder; by default a random one of the demo's shape")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = ServeConfig(port=0, dtype="fp32", cpus_per_replica=options.threads, max_num_seqs=max(options.streams))
    results: dict[str, dict[int, Timing]] = {}
    with tempfile.TemporaryDirectory(prefix="sj") as temporary:
        folder = options.model or make_model_folder(
            Path(temporary),
            d_model=options.d_model,
            num_layers=options.layers,
            num_heads=8,
            num_kv_heads=8,
            vocab_size=options.vocab,
            max_positions=options.prompt_tokens + options.new_tokens,
            init_std=0.05,
        )
        vocab_size = read_model_folder(folder).vocab_size
        rng = np.random.default_rng(0)
        prompts = rng.integers(1, vocab_size, (max(options.streams), options.prompt_tokens)).tolist()

        def sweep(name: str, run: Runner) -> None:
            run(prompts[:1])
            results[name] = {count: measure(run, prompts[:count], options.repeats) for count in options.streams}

        sweep("engine", engine_runner(folder, config, options.new_tokens))
        sweep("transformers", transformers_runner(folder, options.new_tokens))
        with endpoint_runner(folder, config, options.new_tokens) as run:
            sweep("endpoint", run)
    report(options, results)


def report(options: argparse.Namespace, results: dict[str, dict[int, Timing]]) -> None:
    """The table and the JSON line."""
    rows = []
    print(f"{'':14}{'streams':>8}{'tok/s':>9}{'TTFT p50':>10}{'ITL p50':>9}{'ITL p99':>9}  (ms)")
    for name, by_count in results.items():
        for count, timing in by_count.items():
            ttft = 1e3 * float(np.percentile(timing.ttft_s, 50))
            itl_50, itl_99 = (1e3 * float(value) for value in np.percentile(timing.itl_s, [50, 99]))
            speed = timing.tokens / timing.wall_s
            print(f"{name:14}{count:8}{speed:9.0f}{ttft:10.1f}{itl_50:9.2f}{itl_99:9.2f}")
            rows.append(
                {
                    "system": name,
                    "streams": count,
                    "tokens_per_s": round(speed, 1),
                    "wall_s": round(timing.wall_s, 4),
                    "ttft_p50_ms": round(ttft, 2),
                    "itl_p50_ms": round(itl_50, 3),
                    "itl_p99_ms": round(itl_99, 3),
                    "num_itl": len(timing.itl_s),
                }
            )
    ratios: dict[str, Any] = {
        f"engine_over_transformers_{count}": round(
            results["transformers"][count].wall_s / results["engine"][count].wall_s, 2
        )
        for count in options.streams
    }
    if {1, 8} <= set(options.streams):
        for name, by_count in results.items():
            ratios[f"{name}_wall_8_over_1"] = round(by_count[8].wall_s / by_count[1].wall_s, 2)
    settings = {key: value for key, value in vars(options).items() if key != "streams"}
    print(
        json.dumps(
            {
                "benchmark": "serving",
                "settings": settings,
                "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "torch": torch.__version__},
                "rows": rows,
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
