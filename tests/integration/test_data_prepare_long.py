"""Preparation of about 200 MB of real mixed text: its speed, its memory, and its bytes after kills."""

import random
import shutil
from pathlib import Path

import pytest

from benchmarks.parts.corpus import build_corpus, cache_folder, salted
from benchmarks.prepare import config_for, given_tokenizer, run_encode_batch, run_prepare, texts_of
from data_service.prepare import prepare
from data_service.stages import Sizes
from tests.helpers.prepare_process import prepare_until_killed

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def corpus() -> list[Path]:
    """The corpus; packages that cannot be had are named on the way."""
    said: list[str] = []
    paths = build_corpus(say=said.append)
    size = sum(path.stat().st_size for path in paths)
    if size < 50e6:
        pytest.skip(f"the packages with the text cannot be had here: {'; '.join(said)}")
    return paths


@pytest.fixture(scope="module")
def config(corpus):
    return config_for(corpus, given_tokenizer(corpus))


@pytest.fixture(scope="module")
def folder():
    """A place on the disk of the corpus, removed at the end."""
    folder = cache_folder() / "long-test"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_nearly_as_fast_as_encode_batch_alone(corpus, config, folder):
    tokenizer = Path(config.tokenizer.path)
    texts = list(texts_of(corpus))
    theirs, ours = [], []
    for _ in range(3):
        theirs.append(run_encode_batch(tokenizer, texts)[0])
        ours.append(run_prepare(config, folder / "two", 2).wall_s)
    assert min(theirs) / min(ours) >= 0.8, (theirs, ours)


def test_bytes_are_the_same_with_one_process_and_after_kills(config, folder):
    if not (folder / "two").exists():
        run_prepare(config, folder / "two", 2)
    two = tree(folder / "two")
    run_prepare(config, folder / "one", 1)
    assert tree(folder / "one") == two
    shutil.rmtree(folder / "one")
    rng = random.Random(3)
    kills = 0
    # What is finished stays, so the kills come to an end.
    while not prepare_until_killed(
        config, str(folder / "killed"), sizes=Sizes(), kill_after_s=rng.uniform(2.0, 12.0), processes=2
    ):
        kills += 1
        assert kills < 60
    assert kills >= 2
    assert tree(folder / "killed") == two


def test_memory_is_flat_when_the_text_grows_four_times(corpus, config, folder):
    tokenizer = Path(config.tokenizer.path)
    peaks = []
    for copies in (1, 4):
        paths = salted(corpus, cache_folder() / "salted", copies)
        peaks.append(run_prepare(config_for(paths, tokenizer), folder / "memory", 2).peak_bytes)
        shutil.rmtree(folder / "memory")
    assert peaks[1] <= 1.25 * peaks[0], peaks


def test_files_added_to_it_are_the_only_ones_encoded(config, folder):
    first = config.model_copy(update={"sources": config.sources[:-2]})
    prepare(first, str(folder / "grows"))
    told = []
    manifest = prepare(config, str(folder / "grows"), progress=told.append)
    assert manifest.generation == 1
    read = max(one.total for one in told if one.stage == "read")
    assert read == sum(Path(source.path).stat().st_size for source in config.sources[-2:])
    whole = prepare(config, str(folder / "two"))
    assert manifest.num_documents() == whole.num_documents()
    assert manifest.num_tokens() == whole.num_tokens()
