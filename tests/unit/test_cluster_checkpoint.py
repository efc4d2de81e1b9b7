"""`stormjib checkpoint list | verify | export` on steps that are whole, damaged, half-written or shut out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.cli import main
from cluster.config import load_config
from cluster.run_store import RunFolder
from tests.helpers.runs import write_run
from tests.helpers.written_parts import commit_whole
from tests.unit.test_cluster_export import commit_model
from trainer.fences import raise_fence

SHAPES = {"embedding.weight": (13, 8), "blocks.0.up.weight": (24, 8)}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(["checkpoint", *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Steps 10 and 20 are whole, 30 was never committed, 40 has a flipped bit, 50 a cut part, 60 was shut out."""
    path = write_run(tmp_path)
    uri = RunFolder(load_config(path).root).checkpoints_uri
    for step in (10, 20, 30, 40, 50, 60):
        commit_whole(uri, step, 2 if step < 60 else 1, SHAPES)
    raise_fence(uri, 2, 50)
    Path(uri, "step_00000030", "manifest.json").unlink()
    parts = {step: Path(uri, f"step_{step:08d}", "attempt_2", "rank_00001.safetensors") for step in (40, 50)}
    content = bytearray(parts[40].read_bytes())
    content[-1] ^= 1
    parts[40].write_bytes(content)
    parts[50].write_bytes(parts[50].read_bytes()[:-4])
    return str(path)


def by_step(text: str) -> dict[int, Any]:
    return {row["step"]: row for row in json.loads(text)}


def test_list_names_what_cannot_be_used(file: str, run: Run) -> None:
    status, text, _ = run("list", file, "--json")
    rows = by_step(text)
    assert status == 0
    assert [row["status"] for row in rows.values()] == [
        *("committed", "committed", "half-written", "committed", "committed", "half-written"),
    ]
    assert (rows[10]["dp"], rows[10]["pp"], rows[10]["attempt"], rows[10]["reason"]) == (2, 1, 2, None)
    assert rows[10]["bytes"] > 12 * 296
    assert "no manifest.json" in rows[30]["reason"]
    assert "behind the back of attempt 2" in rows[60]["reason"]
    status, text, _ = run("list", file)
    assert status == 0
    assert [line.split()[1] for line in text.splitlines()] == ["10", "20", "30", "40", "50", "60"]
    assert "half-written" in text.splitlines()[2]


def test_verify_reads_every_byte_or_looks_at_lengths(file: str, run: Run) -> None:
    status, text, _ = run("verify", file, "--json")
    rows = by_step(text)
    assert status == 1
    assert {step: row["status"] for step, row in rows.items()} == {
        10: "committed", 20: "committed", 30: "half-written", 40: "damaged", 50: "damaged", 60: "half-written",
    }  # fmt: skip
    assert "rank_00001.safetensors" in rows[40]["reason"]
    assert "checksum" in rows[40]["reason"]
    status, text, _ = run("verify", file, "--shallow", "--json")
    rows = by_step(text)
    assert status == 1
    assert (rows[40]["status"], rows[50]["status"]) == ("committed", "damaged")
    status, text, _ = run("verify", file)
    assert status == 1
    assert "every byte is right" in text.splitlines()[0]
    assert "damaged" in text.splitlines()[3]


def test_verify_of_one_step_has_that_steps_exit_code(file: str, run: Run) -> None:
    assert run("verify", file, "--step", "20")[0] == 0
    assert run("verify", file, "--step", "40")[0] == 1
    assert run("verify", file, "--step", "40", "--shallow")[0] == 0
    status, _, error = run("verify", file, "--step", "30")
    assert status == 2
    assert "no checkpoint of step 30; committed: 10, 20, 40, 50" in error


def test_verify_without_any_checkpoint_fails(tmp_path: Path, run: Run) -> None:
    status, text, _ = run("verify", str(write_run(tmp_path)))
    assert status == 1
    assert "no committed checkpoint" in text


def test_a_manifest_that_cannot_be_read_is_named(file: str, run: Run) -> None:
    uri = RunFolder(load_config(Path(file)).root).checkpoints_uri
    Path(uri, "step_00000020", "manifest.json").write_text("{")
    status, text, _ = run("list", file, "--json")
    assert status == 0
    assert by_step(text)[20]["status"] == "damaged"
    assert "no checkpoint manifest" in by_step(text)[20]["reason"]


def test_options_of_other_actions_are_refused(file: str, run: Run) -> None:
    for arguments in (
        ("list", "--step", "10"),
        ("verify", "--after", "10"),
        ("drop", "--json"),
        ("export", "--shallow"),
    ):
        action, *rest = arguments
        status, _, error = run(action, file, *rest)
        assert status == 2
        assert f"checkpoint {action} {rest[0]}: it takes" in error


def test_export_writes_the_dtype_asked_for(tmp_path: Path, run: Run) -> None:
    path = write_run(tmp_path)
    commit_model(load_config(path), 4)
    found = {}
    for dtype in ("fp32", "bf16"):
        status, out, _ = run("export", str(path), "--step", "4", "--out", str(tmp_path / dtype), "--dtype", dtype)
        assert (status, out.strip()) == (0, str(tmp_path / dtype))
        found[dtype] = load_file(tmp_path / dtype / "model.safetensors")
        described = json.loads((tmp_path / dtype / "config.json").read_text())
        assert described["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert {values.dtype for values in found["bf16"].values()} == {torch.bfloat16}
    for name, values in found["fp32"].items():
        assert torch.equal(values.bfloat16(), found["bf16"][name])
