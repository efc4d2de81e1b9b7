"""Each mistake of a user ends with exit code 2 and a message of one screen that names key, file, line and fix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_service.shards import read_tokens
from tests.helpers.runs import ROOT, write_run


def stormjib(
    *arguments: str, timeout: float = 100, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
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
    assert_mistake(
        stormjib("prepare", str(file)), "corpus.csv", "the CSV is empty", "Give it a header line and records"
    )
    (tmp_path / "corpus.csv").write_text("text,label\n")
    assert_mistake(
        stormjib("prepare", str(file)), "corpus.csv", "a header and no records", "Add records, or remove the source"
    )


def test_broken_rows_are_rejected_and_counted(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    with (tmp_path / "corpus.csv").open("ab") as corpus:
        corpus.write(b'a "stray quote" inside,0\n')
        corpus.write(b'"never closed,0\n')
        corpus.write(b"bad \xff\xfe bytes,1\n")
        corpus.write(b"a good last row of words,1\n")
    ended = stormjib("prepare", str(file))
    assert ended.returncode == 0, ended.stderr
    dataset = tmp_path / "runs" / "small" / "dataset"
    rejects = [json.loads(line) for line in (dataset / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    corpus_file = str(tmp_path / "corpus.csv")
    assert [(reject["file"], reject["line"]) for reject in rejects] == [(corpus_file, 403), (corpus_file, 404)]
    assert "broken quotes: a quoted field is never closed" in rejects[0]["reason"]
    assert "invalid UTF-8" in rejects[1]["reason"]
    assert "2 records" in ended.stdout
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer" / "tokenizer.json"))
    ids = [int(i) for split in ("train", "eval") for part in read_tokens(str(dataset), split) for i in part]
    documents = tokenizer.decode(ids, skip_special_tokens=False).split("<|endoftext|>")
    assert documents.count("a good last row of words") == 1
    assert documents.count('a "stray quote" inside') == 1
    assert not any("never closed" in document or "bytes" in document for document in documents)


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


@pytest.mark.parametrize(
    ("storage", "parts"),
    [
        ("foo://x", ("foo://x", "Protocol not known", "Use a folder or an s3:// URI")),
        ("s3://nothing/x", ("s3://nothing/x", "credentials", "AWS_ACCESS_KEY_ID")),
    ],
)
def test_a_store_that_cannot_be_used_is_named(tmp_path: Path, storage: str, parts: tuple[str, ...]) -> None:
    without = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), "")
    without |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    file = write_run(tmp_path)
    assert_mistake(stormjib("status", str(file), f"run.storage={storage}", env=without), *parts)


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    saved = tmp_path / "runs" / "small" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("run: {name: small, colour: red}\ntrain: {steps: 5}\n")
    assert_mistake(stormjib("train", str(file)), "another version", "run.colour", "run.name")
    saved.write_text("a: [")
    assert_mistake(stormjib("train", str(file)), str(saved), "damaged", "run.name")


def test_a_failing_disk_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    """/dev/full takes no byte."""
    file = write_run(tmp_path)
    checked = stormjib("prepare", str(file), "data.dataset=/dev/full/dataset")
    assert checked.returncode == 1
    (line,) = checked.stderr.splitlines()
    assert line.startswith("stormjib prepare: /dev/full/dataset/manifest.json: ")
    assert "Not a directory" in line
    assert "data.dataset" in line


def test_overrides_may_stand_after_options(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    for arguments in (
        [str(file), "--resolved", "train.steps=3"],
        ["--resolved", str(file), "train.steps=3"],
        [str(file), "train.steps=3", "--resolved", "run.seed=4"],
    ):
        shown = stormjib("config", *arguments)
        assert shown.returncode == 0, shown.stderr
        assert "\n  steps: 3\n" in shown.stdout
    assert_mistake(stormjib("generate", "--prompt", "x", str(file), "serve.port=0"), "no export yet")
    assert_mistake(stormjib("config", str(file), "--resolvd"), "unrecognized arguments: --resolvd")
