import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import openai
import psutil
import pytest
import ray

from data_service.errors import ConfigError
from serve.config import ServeConfig
from serve.deployment import deploy, engine_stats, undeploy
from serve.engine.messages import EngineStats
from serve.spec import Endpoint, ServeSpec
from tests.helpers.tiny_model import CORPUS, make_model_folder

KEY = "a key for this test"
pytestmark = pytest.mark.timeout(180)


@dataclasses.dataclass(frozen=True)
class Running:
    endpoint: Endpoint
    spec: ServeSpec
    client: openai.OpenAI


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = make_model_folder(tmp_path_factory.mktemp("model"), max_positions=4096)
    config = ServeConfig(port=0, api_key_env="STORMJIB_TEST_KEY", kv_cache_tokens=65536)
    spec = ServeSpec(folder, "tiny", 20, "0123456789abcdef", config)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="sj") as short:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("STORMJIB_TEST_KEY", KEY)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _temp_dir=short,
        )
        try:
            endpoint = deploy(spec)
            patch.delenv("STORMJIB_TEST_KEY")
            yield Running(endpoint, spec, openai.OpenAI(base_url=endpoint.url + "/v1", api_key=KEY, max_retries=0))
            undeploy(endpoint)
            undeploy(endpoint)
            address = urlsplit(endpoint.url)
            with socket.socket() as probe:
                assert probe.connect_ex((address.hostname, address.port)) != 0, "the proxy still listens"
            assert ray.util.list_named_actors(all_namespaces=True) == []
        finally:
            ray.shutdown()


def wait_idle(running: Running, deadline_s: float = 20.0) -> EngineStats:
    end = time.monotonic() + deadline_s
    while (stats := engine_stats(running.endpoint)).num_running or stats.num_waiting or stats.blocks_used:
        assert time.monotonic() < end, stats
    return stats


@dataclasses.dataclass(frozen=True)
class Streamed:
    """What a greedy stream brought."""

    text: str
    tokens: list[str]
    gaps: list[float]
    """For each token, by how much its logarithmic probability exceeds that of the second."""


def greedy(client: openai.OpenAI, prompt: str, max_tokens: int) -> Streamed:
    text, tokens, gaps = "", list[str](), list[float]()
    stream = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        logprobs=2,
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        text += chunk.choices[0].text
        report = chunk.choices[0].logprobs
        if report is not None:
            assert report.tokens is not None
            assert report.top_logprobs is not None
            tokens += report.tokens
            for top in report.top_logprobs:
                best, second = sorted(top.values(), reverse=True)
                gaps.append(best - second)
    assert len(tokens) == len(gaps) == max_tokens
    return Streamed(text, tokens, gaps)


def test_openai_client_completes_and_streams(running: Running) -> None:
    client = running.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.completions.create(model="tiny", prompt=CORPUS[0], max_tokens=120, temperature=0)
    assert whole.system_fingerprint == "step-20-0123456789abcdef"
    assert whole.usage is not None
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=CORPUS[0],
            max_tokens=120,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 3
    assert {chunk.system_fingerprint for chunk in chunks} == {"step-20-0123456789abcdef"}


def test_eight_streams_give_the_text_of_one_alone(running: Running) -> None:
    prompts = [f"{CORPUS[n % len(CORPUS)]} {n}" for n in range(8)]
    alone = [greedy(running.client, prompt, 60) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: greedy(running.client, prompt, 60), prompts))
    for one, other in zip(alone, together, strict=True):
        differing = [n for n, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b]
        if differing:  # another order of additions may decide a tie, and nothing else
            assert max(one.gaps[differing[0]], other.gaps[differing[0]]) < 1e-3, (one, other)
        else:
            assert one.text == other.text
    wait_idle(running)


def test_ninth_starts_before_the_eight_end_and_hanging_up_frees_blocks(running: Running) -> None:
    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    hang_up = threading.Event()

    def follow(number: int) -> None:
        stream = running.client.completions.create(
            model="tiny", prompt=f"这是 {number}", max_tokens=3500, stream=True, extra_body={"ignore_eos": True}
        )
        for count, _ in enumerate(stream):
            if count == 0:
                events.put("first")
            if hang_up.is_set():
                stream.close()
                return
        events.put("end")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        eight = [pool.submit(follow, number) for number in range(8)]
        assert [events.get(timeout=60) for _ in range(8)] == ["first"] * 8
        ninth = running.client.completions.create(model="tiny", prompt="她", max_tokens=5, stream=True)
        next(iter(ninth))
        assert events.empty(), "one of the eight had ended"
        assert engine_stats(running.endpoint).num_running >= 8
        ninth.close()
        hang_up.set()
        for future in eight:
            future.result(timeout=60)
    before = wait_idle(running)
    assert before.tokens_out < 8 * 3500


def test_hanging_up_on_a_whole_answer_frees_its_blocks(running: Running) -> None:
    made = engine_stats(running.endpoint).tokens_out
    hasty = running.client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(model="tiny", prompt="x", max_tokens=3500, extra_body={"ignore_eos": True})
    assert wait_idle(running).tokens_out < made + 3500


def test_errors_come_as_the_clients_own_classes(running: Running) -> None:
    client = running.client
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="x", temperature=5)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="x", max_tokens=10**6, stream=True)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").completions.create(model="tiny", prompt="x")


def test_a_missing_key_or_model_fails_before_anything_starts(running: Running, tmp_path: Path) -> None:
    assert "STORMJIB_TEST_KEY" not in os.environ
    with pytest.raises(ConfigError, match="STORMJIB_TEST_KEY"):
        deploy(running.spec)
    with pytest.raises(ConfigError, match=r"config\.json"):
        deploy(ServeSpec(str(tmp_path), "tiny"))
    assert running.client.models.list().data


def engine_process(app_name: str) -> psutil.Process:
    children = psutil.Process().children(recursive=True)
    found = [child for child in children if f"ServeReplica:{app_name}:Engine" in " ".join(child.cmdline())]
    assert len(found) == 1, found
    return found[0]


def test_a_lost_engine_is_told_to_clients_and_replaced(running: Running) -> None:
    stream = running.client.completions.create(
        model="tiny", prompt="x", max_tokens=3500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    engine_process(running.endpoint.app_name).kill()
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert "engine replica was lost" in str(failed.value)
    deadline = time.monotonic() + 60
    answer = None
    while answer is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(openai.InternalServerError):  # 503 until the new replica answers
            answer = running.client.completions.create(model="tiny", prompt="x", max_tokens=2, timeout=20)


def test_another_model_takes_over_at_the_same_address(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORMJIB_TEST_KEY", KEY)
    updated = deploy(dataclasses.replace(running.spec, step=40))
    assert updated.url == running.endpoint.url
    answer = running.client.completions.create(model="tiny", prompt="x", max_tokens=2)
    assert answer.system_fingerprint == updated.fingerprint == "step-40-0123456789abcdef"
