"""Each mistake of a user ends with exit code 2 and a message of one screen that names key, file, line and fix."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, write_run


def stormjib(*arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def assert_mistake(ended: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 24, ended.stderr
    for part in parts:
        assert part in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.parallel.ppp=2", ("train.parallel.ppp", "Did you mean pp?")),
        ("train.steps=many", ("train.steps", "'many'")),
        ("train.parallel.pp=9", ("train.parallel.pp=9", "model.num_layers=2")),
        ("train.zero.stage=2", ("zero.stage=2", "pp=2", "zero.stage=1")),
        ("train.parallel.dp=5", ("dp=5", "10 slots", "gives 2")),
        ("data.sources.0.path=nothing.csv", ("nothing.csv",)),
        ("data.sources.0.text=body", ("body", "text", "label")),
    ],
)
def test_a_wrong_value_is_named_before_anything_starts(tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    file = write_run(tmp_path)
    ended = stormjib("prepare", str(file), "train.parallel.pp=2", override)
    assert_mistake(ended, *parts)
    assert not (tmp_path / "runs" / "small" / "dataset" / "manifest.json").exists()


def test_a_key_in_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = write_run(tmp_path, train="  stepps: 3")
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "stepps" in text)
    assert_mistake(stormjib("config", str(file)), f"run.yaml:{line}", "train.stepps", "Did you mean steps?")


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    assert_mistake(stormjib("train", str(tmp_path / "no.yaml")), "no.yaml", "cannot read")


def test_an_empty_csv_is_named(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    (tmp_path / "corpus.csv").write_text("")
    assert_mistake(stormjib("prepare", str(file)), "corpus.csv")
    (tmp_path / "corpus.csv").write_text("text,label\n")
    assert_mistake(stormjib("prepare", str(file)), "corpus.csv")


def test_broken_rows_are_rejected_and_counted(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    with (tmp_path / "corpus.csv").open("ab") as corpus:
        corpus.write(b'a "stray quote" inside,0\n')
        corpus.write(b'"never closed,0\n')
        corpus.write(b"bad \xff\xfe bytes,1\n")
        corpus.write(b"a good last row of words,1\n")
    ended = stormjib("prepare", str(file))
    assert ended.returncode == 0, ended.stderr
    rejects = (tmp_path / "runs" / "small" / "dataset" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert rejects
    assert all("corpus.csv" in line and '"line"' in line and '"reason"' in line for line in rejects)
    assert f"{len(rejects):,} records" in ended.stdout


def test_training_on_other_data_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    assert stormjib("prepare", str(file)).returncode == 0
    manifest = tmp_path / "runs" / "small" / "dataset" / "manifest.json"
    before = manifest.read_bytes()
    with (tmp_path / "corpus.csv").open("a") as corpus:
        corpus.write("one more row of words,1\n")
    assert_mistake(stormjib("prepare", str(file)), "dataset")
    assert manifest.read_bytes() == before


def test_nothing_to_serve_or_to_generate_from_is_said(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    assert_mistake(stormjib("serve", str(file)), "no export yet")
    assert_mistake(stormjib("generate", str(file), "--prompt", "x"), "no export yet")
    assert_mistake(stormjib("generate", "--model", str(tmp_path), "--prompt", "x"), str(tmp_path))
    assert_mistake(stormjib("export", str(file)), "no checkpoint")


@pytest.mark.timeout(200)
def test_storage_that_a_node_cannot_see_is_refused(tmp_path: Path) -> None:
    """`memory://` is the extreme case: only the process that writes it can read it."""
    file = write_run(tmp_path)
    ended = stormjib("train", str(file), "run.storage=memory://nowhere", timeout=150)
    assert_mistake(ended, "run.storage=memory://nowhere", "cannot read", "s3://")
