"""Trained tokenizers: any text comes back, transformers agrees, and the same texts give the same bytes."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_service.config import TokenizerTrainConfig
from data_service.errors import ConfigError
from data_service.tokenizer import (
    END_TOKEN,
    TokenizerFiles,
    TrainingSample,
    encode_documents,
    folder_digest,
    load_encoder,
    read_tokenizer,
    train_tokenizer,
    write_tokenizer,
)

ROOT = Path(__file__).parents[2]
MODELS = ("bpe", "unigram")
TEXT = (
    "the quick brown fox jumps over the lazy dog, 敏捷的棕色狐狸跳过了懒狗。 naïve café — 123 def f(x):\n    return x\n"
)


def texts() -> list[str]:
    words = TEXT.split(" ")
    chosen = np.random.default_rng(0).integers(0, len(words), (300, 40))
    return [" ".join(words[index] for index in row) for row in chosen]


@pytest.fixture(scope="module")
def trained() -> dict[str, TokenizerFiles]:
    return {model: train_tokenizer(TokenizerTrainConfig(model=model, vocab_size=500), texts) for model in MODELS}


def loaded(files: TokenizerFiles) -> Tokenizer:
    tokenizer = Tokenizer.from_str(dict(files.files)["tokenizer.json"].decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("model", MODELS)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), max_size=80))
def test_any_text_comes_back(trained: dict[str, TokenizerFiles], model: str, text: str) -> None:
    tokenizer = loaded(trained[model])
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert trained[model].eos_id not in ids


@pytest.mark.parametrize("model", MODELS)
def test_a_tokenizer_learns_the_corpus(trained: dict[str, TokenizerFiles], model: str) -> None:
    files = trained[model]
    assert files.vocab_size <= 500
    tokenizer = loaded(files)
    sample = " ".join(texts()[:20])
    assert len(tokenizer.encode(sample).ids) < 0.4 * len(sample.encode())
    assert tokenizer.encode(" fox").tokens == ["Ġfox"]
    ids = tokenizer.encode(f"a {END_TOKEN} b").ids
    assert files.eos_id not in ids
    assert tokenizer.decode(ids) == f"a {END_TOKEN} b"


@pytest.mark.parametrize("model", MODELS)
def test_transformers_loads_the_folder_and_agrees(
    trained: dict[str, TokenizerFiles], model: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    files = trained[model]
    write_tokenizer(str(tmp_path), files)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    ours = load_encoder(str(tmp_path), files.digest)
    for text in [*texts()[:20], "🙂 \u200d\t\r\n  x", "ÅǺ \x00 zz"]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == files.eos_id
    assert len(theirs) == files.vocab_size
    tokens, lengths = encode_documents(ours, ["one fox", ""], files.eos_id, files.token_dtype)
    assert tokens.tolist() == [*ours.encode("one fox").ids, files.eos_id, files.eos_id]
    assert lengths.tolist() == [tokens.size - 1, 1]


@pytest.mark.parametrize("model", MODELS)
def test_what_is_written_is_read_the_same(trained: dict[str, TokenizerFiles], model: str, tmp_path: Path) -> None:
    write_tokenizer(str(tmp_path), trained[model])
    again = read_tokenizer(str(tmp_path))
    assert again == trained[model]
    assert folder_digest(str(tmp_path)) == again.digest
    templated = again.with_chat_template("{{ messages }}")
    write_tokenizer(str(tmp_path), templated)
    assert read_tokenizer(str(tmp_path)) == templated
    assert folder_digest(str(tmp_path)) == templated.digest != again.digest
    (tmp_path / "tokenizer_config.json").unlink()
    assert folder_digest(str(tmp_path)) is None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("threads", ["1", "3"])
def test_every_process_trains_the_same_bytes(trained: dict[str, TokenizerFiles], model: str, threads: str) -> None:
    code = (
        "from tests.unit.test_data_tokenizer import *\n"
        f"print(train_tokenizer(TokenizerTrainConfig(model={model!r}, vocab_size=500), texts).digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert done.stdout.strip() == trained[model].digest


def test_few_texts_give_a_small_unigram_vocabulary() -> None:
    files = train_tokenizer(TokenizerTrainConfig(model="unigram", vocab_size=5000), lambda: ["abc abc"])
    assert 257 <= files.vocab_size < 270
    assert loaded(files).decode(loaded(files).encode("z好").ids) == "z好"


def test_a_tokenizer_without_an_end_is_refused_and_objects_become_texts(
    trained: dict[str, TokenizerFiles], tmp_path: Path
) -> None:
    tokenizer = json.loads(dict(trained["bpe"].files)["tokenizer.json"])
    tokenizer["added_tokens"][0]["content"] = "<stop>"
    tokenizer["model"]["vocab"]["<stop>"] = tokenizer["model"]["vocab"].pop(END_TOKEN)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"no end token was found.*tokenizer_config\.json with an eos_token"):
        read_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>", "lstrip": False}}))
    files = read_tokenizer(str(tmp_path / "tokenizer.json"))
    assert files.special_tokens == {"eos_token": "<stop>", "pad_token": "<stop>"}
    assert json.loads(dict(files.files)["tokenizer_config.json"])["eos_token"] == "<stop>"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is not UTF-8"):
        read_tokenizer(str(tmp_path))


@settings(deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 3000)), min_size=1, max_size=200),
    order=st.randoms(),
    max_bytes=st.integers(5000, 300_000),
    first=st.sampled_from([0, 2**62, 2**64 - 1]),
)
def test_the_sample_is_those_of_the_least_hashes_in_any_order(
    documents: list[tuple[int, int]], order: random.Random, max_bytes: int, first: int
) -> None:
    chosen = []
    for turn in range(2):
        sample = TrainingSample(max_bytes)
        for begin in range(0, len(documents), 7):
            part = documents[begin : begin + 7]
            sample.add(np.array([one[0] for one in part], np.uint64), np.array([one[1] for one in part]))
        chosen.append(sample.below(first))
        if not turn:
            order.shuffle(documents)
    assert chosen[0] == chosen[1]
    counted = sorted((value, size) for value, size in documents if value >> 44 >= first >> 44)
    if sum(size for _, size in counted) <= max_bytes:
        assert chosen[0] == 2**64
    if len({value >> 44 for value, _ in counted}) == len(counted):
        taken = [size for value, size in counted if value < chosen[0]]
        left = [size for value, size in counted if value >= chosen[0]]
        assert sum(taken) <= max_bytes or len(taken) == 1
        assert not left or sum(taken) + left[0] > max_bytes


def test_the_sample_takes_its_share_of_a_large_corpus() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    sizes = np.full(hashes.size, 1000)
    sample = TrainingSample(20_000_000)
    sample.add(hashes, sizes)
    taken = int((hashes < np.uint64(sample.below())).sum())
    assert 19_900 < taken <= 20_000
    held_out = 2**60
    behind = sample.below(held_out)
    assert 19_900 < int(((hashes >= np.uint64(held_out)) & (hashes < np.uint64(behind))).sum()) <= 20_001


def test_the_digest_is_of_names_and_contents() -> None:
    files = train_tokenizer(TokenizerTrainConfig(vocab_size=300), texts)
    state = hashlib.blake2b(digest_size=16)
    for name, content in files.files:
        state.update(f"{name}\0{len(content)}\0".encode() + content)
    assert files.digest == state.hexdigest()
