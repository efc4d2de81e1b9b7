import asyncio
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_service.errors import ConfigError
from serve.config import ServeConfig
from serve.engine.core import EngineCore
from serve.engine.driver import EngineDriver
from serve.engine.messages import Delta, EngineRequest
from serve.engine.packed_linear import PackedLinear, packing_works
from serve.engine.sequence import SamplingParams
from serve.errors import EngineFailedError, OverloadedError
from serve.generate import stream_text
from serve.model_folder import read_model_folder
from serve.weights import build_engine
from tests.helpers.tiny_model import CORPUS, make_model_folder
from trainer.architecture import Family

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
TOP_2_GAP = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(folder: str) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def engine(folder: str, **settings: object) -> EngineCore:
    return build_engine(folder, ServeConfig(**settings), "cpu")[0]  # type: ignore[arg-type]


def prompts(folder: str, count: int) -> list[tuple[int, ...]]:
    texts = itertools.islice(itertools.cycle(CORPUS), count)
    return [tuple(read_model_folder(folder).encode(text)[: 3 + number * 2]) for number, text in enumerate(texts)]


def drain(core: EngineCore) -> dict[tuple[str, int], Delta]:
    whole: dict[tuple[str, int], Delta] = {}
    while core.has_work:
        for request_id, delta in core.step():
            key = (request_id, delta.index)
            if key in whole:
                whole[key].absorb(delta)
            else:
                whole[key] = delta
    return whole


def assert_greedy(reference: torch.nn.Module, prompt: tuple[int, ...], tokens: list[int]) -> None:
    """Each token is the most likely one, given those before, or within TOP_2_GAP of it."""
    with torch.inference_mode():
        logits_TV = reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    best_T = logits_TV.max(-1).values
    chosen_T = logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((best_T - chosen_T).max()) < TOP_2_GAP


def test_greedy_tokens_equal_transformers_generate(folder: str, reference: torch.nn.Module) -> None:
    core = engine(folder)
    for number, prompt in enumerate(prompts(folder, 3)):
        core.add(EngineRequest(str(number), (prompt,), 1, GREEDY))
        ours = drain(core)[str(number), 0].tokens
        theirs = reference.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert ours == theirs


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt2"])
def test_every_causal_family_is_served(family: Family, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path, family=family, num_kv_heads=None if family == "gpt2" else 2, max_positions=128)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    long = tuple(token for text in CORPUS for token in read_model_folder(folder).encode(text))[:60]
    core = engine(folder, block_tokens=16)
    core.add(EngineRequest("all", (*prompts(folder, 3), long), 1, GREEDY))
    whole = drain(core)
    for number, prompt in enumerate((*prompts(folder, 3), long)):
        assert_greedy(reference, prompt, whole["all", number].tokens)
    assert len({delta.text for delta in whole.values()}) == 4


def test_models_that_write_no_text_are_refused(tmp_path: Path) -> None:
    encoder = make_model_folder(tmp_path / "encoder", family="bert", num_kv_heads=None)
    classifier = make_model_folder(tmp_path / "classifier", num_labels=3)
    for folder, named in ((encoder, "an encoder"), (classifier, "a classifier of 3 classes")):
        with pytest.raises(ConfigError, match=named):
            build_engine(folder, ServeConfig(), "cpu")


def test_eight_together_give_the_text_of_one_alone(folder: str, reference: torch.nn.Module) -> None:
    many = prompts(folder, 8)
    alone = []
    for prompt in many:
        core = engine(folder)
        core.add(EngineRequest("one", (prompt,), 1, GREEDY))
        alone.append(drain(core)["one", 0])
    core = engine(folder)
    core.add(EngineRequest("all", tuple(many), 1, GREEDY))
    together = drain(core)
    for number, prompt in enumerate(many):
        assert_greedy(reference, prompt, together["all", number].tokens)
        if together["all", number].tokens != alone[number].tokens:
            assert_greedy(reference, prompt, alone[number].tokens)
    assert sum(together["all", n].text == alone[n].text for n in range(8)) >= 7
    assert len({delta.text for delta in alone}) == 8


def test_ninth_has_its_first_token_before_the_first_eight_end(folder: str) -> None:
    core = engine(folder)
    core.add(EngineRequest("eight", tuple(prompts(folder, 8)), 1, GREEDY))
    for _ in range(4):
        core.step()
    core.add(EngineRequest("ninth", (prompts(folder, 9)[-1],), 1, GREEDY))
    first_of_ninth = core.step()
    assert ("ninth", 0) in {(request_id, delta.index) for request_id, delta in first_of_ninth}
    assert all(delta.finish_reason is None for _, delta in first_of_ninth)
    assert len(first_of_ninth) == 9


def test_eight_streams_share_their_passes(folder: str) -> None:
    """What bounds the wall time of eight: a pass decodes all of them (in seconds: benchmarks/serving.py)."""
    alone, together = engine(folder), engine(folder)
    alone.add(EngineRequest("one", (prompts(folder, 8)[-1],), 1, GREEDY))
    together.add(EngineRequest("eight", tuple(prompts(folder, 8)), 1, GREEDY))
    drain(alone)
    drain(together)
    assert together.stats().tokens_out == 8 * alone.stats().tokens_out
    assert together.stats().passes == alone.stats().passes == 24


def test_packed_matrices_multiply_as_plain_ones() -> None:
    if not packing_works(torch.float32):
        pytest.skip("this torch or CPU has no packed matrices")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    bias = torch.randn(96, generator=generator)
    with torch.inference_mode():
        packed, shifted = PackedLinear(weight), PackedLinear(weight, bias)
        for rows in (1, 2, 8, 33):
            x = torch.randn(1, rows, 64, generator=generator)
            torch.testing.assert_close(packed(x), x @ weight.T, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(shifted(x), x @ weight.T + bias, atol=1e-4, rtol=1e-4)


def test_prompt_in_chunks_beside_decoding_changes_nothing(folder: str, reference: torch.nn.Module) -> None:
    long = tuple(token for text in CORPUS for token in read_model_folder(folder).encode(text))[:200]
    core = engine(folder, block_tokens=7)
    core._scheduler.budget_tokens = 20
    core.add(EngineRequest("short", (prompts(folder, 1)[0],), 1, GREEDY))
    [(_, started)] = core.step()
    core.add(EngineRequest("long", (long,), 1, GREEDY))
    whole = drain(core)
    assert_greedy(reference, long, whole["long", 0].tokens)
    assert_greedy(reference, prompts(folder, 1)[0], started.tokens + whole["short", 0].tokens)
    assert core.stats().passes > 10


def test_blocks_come_back_and_are_used_again(folder: str) -> None:
    core = engine(folder, kv_cache_tokens=64, block_tokens=4, max_num_seqs=4)
    first: list[str] = []
    for _ in range(3):
        core.add(EngineRequest("r", tuple(prompts(folder, 6)), 1, GREEDY))
        texts = [delta.text for _, delta in sorted(drain(core).items())]
        first = first or texts
        assert texts == first
        assert core.stats().blocks_used == 0


def test_prompt_logprobs_match_transformers(folder: str, reference: torch.nn.Module) -> None:
    prompt = prompts(folder, 8)[-1]
    core = engine(folder)
    core._scheduler.budget_tokens = 5
    params = SamplingParams(max_tokens=0, logprobs=2, prompt_logprobs=True)
    core.add(EngineRequest("r", (prompt,), 1, params))
    delta = drain(core)["r", 0]
    with torch.inference_mode():
        expected_TV = torch.log_softmax(reference(torch.tensor([prompt])).logits[0], -1)
    assert [entry.token for entry in delta.prompt_logprobs] == list(prompt[1:])
    for place, entry in enumerate(delta.prompt_logprobs):
        assert abs(entry.logprob - float(expected_TV[place, prompt[place + 1]])) < 1e-3
        assert entry.top[0][0] == int(expected_TV[place].argmax())
    assert delta.tokens == []
    assert delta.finish_reason == "length"


def test_end_token_and_stop_text_end_a_completion(folder: str) -> None:
    prompt = prompts(folder, 2)[1]
    core = engine(folder)
    core.add(EngineRequest("free", (prompt,), 1, GREEDY))
    free = drain(core)["free", 0]
    middle = free.text[8:11]
    core.add(EngineRequest("stop", (prompt,), 1, SamplingParams(24, 0.0, stop=(middle,), ignore_eos=True)))
    stopped = drain(core)["stop", 0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(middle)]
    core._eos_ids = frozenset({free.tokens[5]})
    core.add(EngineRequest("eos", (prompt,), 1, SamplingParams(24, 0.0)))
    ended = drain(core)["eos", 0]
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[5]) + 1]
    assert ended.finish_reason == "stop"


def test_bf16_engine_runs(folder: str) -> None:
    core = engine(folder, dtype="bf16")
    core.add(EngineRequest("r", tuple(prompts(folder, 3)), 1, GREEDY))
    assert all(len(delta.tokens) == 24 for delta in drain(core).values())


def test_stream_text_equals_transformers_and_never_breaks_a_character(folder: str, reference: torch.nn.Module) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(CORPUS[0], return_tensors="pt").input_ids
    theirs = reference.generate(  # type: ignore[operator]
        ids, max_new_tokens=40, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :]
    pieces = list(stream_text(folder, CORPUS[0], 40, 0.0))
    whole = tokenizer.decode(theirs, skip_special_tokens=True)
    assert whole in ("".join(pieces), "".join(pieces) + "\N{REPLACEMENT CHARACTER}")
    assert len(pieces) > 5
    sampled = ["".join(stream_text(folder, "", 12, 0.8, seed=3, top_p=0.9)) for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_stream_text_names_what_is_missing(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        list(stream_text(str(tmp_path), "x", 4))
    with pytest.raises(ConfigError, match="context"):
        list(stream_text(folder, "long " * 300, 4))


async def collect(driver: EngineDriver, request: EngineRequest, **settings: float | None) -> list[list[Delta]]:
    return [deltas async for deltas in driver.generate(request, **settings)]


def test_driver_streams_gathers_and_refuses(folder: str) -> None:
    async def scene() -> None:
        driver = EngineDriver(engine(folder, max_num_seqs=2, max_queue=1))
        try:
            request = EngineRequest("a", (prompts(folder, 1)[0],), 1, GREEDY)
            single = await collect(driver, request, interval_s=0.0)
            gathered = await collect(driver, request, interval_s=None)
            assert len(single) > 5
            assert len(gathered) == 1
            assert "".join(d.text for items in single for d in items) == gathered[0][0].text
            with pytest.raises(OverloadedError):
                await collect(driver, EngineRequest("b", tuple(prompts(folder, 8)), 1, GREEDY))
            assert driver.stats().blocks_used == 0
        finally:
            driver.stop()
        assert not driver.alive

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_late_timer_does_not_end_or_empty_a_stream(folder: str) -> None:
    async def scene() -> None:
        driver = EngineDriver(engine(folder))
        driver.stop()  # deltas are handed in below, at known moments
        stream = driver.generate(EngineRequest("a", ((1,),), 1, GREEDY), interval_s=0.01)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        driver._deliver([("a", Delta(0, "x", [1], [], [], None))])
        driver._deliver([("a", Delta(0, "y", [2], [], [], None))])  # sets a timer, and leaves with the first
        assert [delta.text for delta in await first] == ["xy"]
        end = [("a", Delta(0, "z", [3], [], [], "length"))]
        asyncio.get_running_loop().call_later(0.05, driver._deliver, end)
        assert [[delta.text for delta in item] async for item in stream] == [["z"]]

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_abandoned_stream_frees_its_blocks(folder: str) -> None:
    async def scene() -> None:
        driver = EngineDriver(engine(folder))
        try:
            stream = driver.generate(EngineRequest("a", (prompts(folder, 1)[0],), 1, SamplingParams(240, 0.0)))
            await anext(stream)
            await stream.aclose()
            # the abort goes before the next request, so that nothing of the first is left when this one is done
            await collect(driver, EngineRequest("b", (prompts(folder, 1)[0],), 1, SamplingParams(1, 0.0)))
            stats = driver.stats()
            assert (stats.num_running, stats.blocks_used) == (0, 0)
            assert stats.tokens_out < 240
        finally:
            driver.stop()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_weights_that_give_nan_fail_the_request_and_not_the_engine(folder: str) -> None:
    async def scene() -> None:
        core = engine(folder)
        weight = core._runner.model.head.norm.weight
        kept = weight.clone()
        driver = EngineDriver(core)
        try:
            weight.fill_(float("nan"))
            with pytest.raises(EngineFailedError, match="not finite"):
                await collect(driver, EngineRequest("a", (prompts(folder, 1)[0],), 1, GREEDY))
            weight.copy_(kept)
            assert await collect(driver, EngineRequest("b", (prompts(folder, 1)[0],), 1, GREEDY))
        finally:
            driver.stop()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_pass_that_raises_fails_its_requests_and_not_the_engine(folder: str) -> None:
    async def scene() -> None:
        driver = EngineDriver(engine(folder))
        try:
            with pytest.raises(EngineFailedError, match="pass of the engine"):
                await collect(driver, EngineRequest("a", ((10**6,),), 1, GREEDY))
            assert await collect(driver, EngineRequest("b", (prompts(folder, 1)[0],), 1, GREEDY))
            assert driver.stats().blocks_used == 0
        finally:
            driver.stop()

    asyncio.run(asyncio.wait_for(scene(), 60))
