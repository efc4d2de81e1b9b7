import asyncio
import json
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from serve.api.completions import parse_request
from serve.config import ServeConfig
from serve.engine.driver import EngineDriver
from serve.errors import InvalidRequestError, OverloadedError, PromptTooLongError
from serve.ingress import MAX_BODY_BYTES, build_app
from serve.preflight import key_digest
from serve.spec import ServeSpec
from serve.weights import build_engine
from tests.helpers.local_port import LocalPort
from tests.helpers.tiny_model import CORPUS, make_model_folder

BASE = {"model": "tiny", "prompt": CORPUS[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model_folder(tmp_path_factory.mktemp("model"))


def talk(
    folder: str,
    scene: Callable[[httpx.AsyncClient], Awaitable[None]],
    key: bytes | None = None,
    **settings: Any,
) -> None:
    """Run a scene against the application with a real engine, without Ray."""

    async def run() -> None:
        core, model = build_engine(folder, ServeConfig(**settings), "cpu")
        driver = EngineDriver(core)
        app = build_app(LocalPort(driver), model, "tiny", "step-7-abc", key)
        try:
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await scene(client)
            assert driver.stats().blocks_used == 0
        finally:
            driver.stop()

    asyncio.run(asyncio.wait_for(run(), 90))


def events(answer: httpx.Response) -> list[str]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_whole_and_streamed_answers_agree(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        whole = (await client.post("/v1/completions", json=BASE)).json()
        assert whole["object"] == "text_completion"
        assert whole["system_fingerprint"] == "step-7-abc"
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["usage"]["completion_tokens"] == 8
        assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + 8
        streamed = events(await client.post("/v1/completions", json={**BASE, "stream": True}))
        assert streamed[-1] == "[DONE]"
        chunks = [json.loads(event) for event in streamed[:-1]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert all("usage" not in chunk for chunk in chunks)
        assert len({chunk["id"] for chunk in chunks}) == 1

    talk(folder, scene)


def test_usage_closes_a_stream_where_asked_for(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        body = {**BASE, "stream": True, "stream_options": {"include_usage": True}}
        last = json.loads(events(await client.post("/v1/completions", json=body))[-2])
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 8

    talk(folder, scene)


def test_several_prompts_and_completions_are_numbered(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        body = {**BASE, "prompt": [CORPUS[0], CORPUS[3]], "n": 3, "temperature": 1.0, "seed": 5}
        first = (await client.post("/v1/completions", json=body)).json()
        again = (await client.post("/v1/completions", json=body)).json()
        assert [choice["index"] for choice in first["choices"]] == list(range(6))
        assert [c["text"] for c in first["choices"]] == [c["text"] for c in again["choices"]]
        assert len({c["text"] for c in first["choices"]}) == 6
        assert first["usage"]["completion_tokens"] == 48

    talk(folder, scene)


def test_token_ids_and_an_empty_prompt_are_taken(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        for prompt in ([5, 6, 7], [[5, 6, 7], [8]], "", None):
            answer = await client.post("/v1/completions", json={**BASE, "prompt": prompt})
            assert answer.status_code == 200, answer.text
        answer = await client.post("/v1/completions", json={**BASE, "prompt": [100_000]})
        assert answer.json()["error"]["param"] == "prompt"

    talk(folder, scene)


def test_echo_and_logprobs(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        body = {**BASE, "prompt": CORPUS[2], "echo": True, "logprobs": 2}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        report = choice["logprobs"]
        assert choice["text"].startswith(CORPUS[2])
        assert report["token_logprobs"][0] is None
        assert all(value < 0 for value in report["token_logprobs"][1:])
        lengths = {len(report[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        assert len(lengths) == 1
        assert all(2 <= len(top) <= 3 for top in report["top_logprobs"][1:])
        for token, offset in zip(report["tokens"], report["text_offset"], strict=True):
            if not token.startswith("bytes:"):
                assert choice["text"][offset:].startswith(token)
        streamed = events(await client.post("/v1/completions", json={**body, "stream": True}))
        chunks = [json.loads(event)["choices"][0] for event in streamed[:-1]]
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        assert [t for chunk in chunks for t in chunk["logprobs"]["tokens"]] == report["tokens"]
        scored = (await client.post("/v1/completions", json={**body, "max_tokens": 0})).json()["choices"][0]
        assert scored["text"] == CORPUS[2]
        assert scored["logprobs"]["tokens"] == report["tokens"][:-8]

    talk(folder, scene)


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"temperature": 3}, "temperature", "2"),
        ({"temperature": "hot"}, "temperature", "hot"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": 9999}, "max_tokens", "256"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"n": 0}, "n", "0"),
        ({"best_of": 4}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"logprobs": 6}, "logprobs", "6"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
        ({"stop": ["a"] * 5}, "stop", "4"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": [1, "a"]}, "prompt", "token ids"),
        ({"prompt": {"a": 1}}, "prompt", "token ids"),
        ({"temprature": 1}, "temprature", "temperature"),
        ({"messages": []}, "messages", "Leave it out"),
        ({"prompt": "x " * 300}, "prompt", "256"),
        ({"prompt": "x " * 300_000}, "prompt", "characters"),
        ({"n": 100, "prompt": ["a", "b"]}, "n", "128"),
    ],
)
def test_bad_parameters_are_named(folder: str, change: dict[str, Any], param: str, says: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        for stream in (False, True) if param != "stream_options" else (False,):
            answer = await client.post("/v1/completions", json={**BASE, "stream": stream, **change})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == param
            assert error["type"] == "invalid_request_error"
            assert says in error["message"]

    talk(folder, scene)


def test_every_error_has_the_openai_shape(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        for answer, status in (
            (await client.post("/v1/completions", content=b"{not json"), 400),
            (await client.post("/v1/completions", content=b"[1]"), 400),
            (await client.post("/v1/completions", content=b"\xff\xfe"), 400),
            (await client.post("/v1/completions", json={"prompt": "x"}), 400),
            (await client.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1)), 413),
            (await client.post("/v1/completions", json={**BASE, "model": "other"}), 404),
            (await client.get("/v1/models/other"), 404),
            (await client.get("/v1/nothing"), 404),
            (await client.get("/v1/completions"), 405),
        ):
            assert answer.status_code == status, answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    talk(folder, scene)


def test_models_and_health(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        listed = (await client.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == ["tiny"]
        assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200

    talk(folder, scene)


def test_bearer_key_guards_everything_but_the_probes(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
            for answer in (
                await client.post("/v1/completions", json=BASE, headers=headers),
                await client.get("/v1/models", headers=headers),
                await client.get("/v1/models/tiny", headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/healthz")).status_code == 200
        good = {"authorization": "Bearer right"}
        assert (await client.post("/v1/completions", json=BASE, headers=good)).status_code == 200

    talk(folder, scene, key=key_digest("right"))


def test_full_queue_answers_429_with_advice(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        body = {**BASE, "max_tokens": 100}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(6)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200
        assert codes[-1] == 429
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"

    talk(folder, scene, max_num_seqs=1, max_queue=1)


def test_prompt_larger_than_the_cache_is_refused(folder: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json={**BASE, "max_tokens": 200, "stream": True})
        assert answer.status_code == 400
        assert "serve.kv_cache_tokens" in answer.json()["error"]["message"]

    talk(folder, scene, kv_cache_tokens=64)


def test_null_means_the_default() -> None:
    fields = ("n", "echo", "stop", "seed", "top_p", "stream", "logprobs", "max_tokens", "temperature", "best_of")
    asked = parse_request(json.dumps({"model": "m", "prompt": "p"} | dict.fromkeys(fields)).encode())
    assert asked.num_completions == 1
    assert asked.sampling(3).temperature == 1.0


def test_errors_survive_pickling() -> None:
    for error in (InvalidRequestError("m", "n"), PromptTooLongError("m", "prompt"), OverloadedError("m", 2.0)):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (str(copy), copy.__dict__) == (str(error), error.__dict__)


def test_fingerprint_names_step_and_digest() -> None:
    assert ServeSpec("m", "n", 400, "0123456789abcdef0123").fingerprint == "step-400-0123456789abcdef"
    assert ServeSpec("m", "n").fingerprint == "step-unknown"
