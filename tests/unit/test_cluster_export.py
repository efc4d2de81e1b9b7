"""`stormjib export`: what it writes, and that `serve` and `generate` find it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from cluster.config import RunConfig, load_config
from cluster.events import Event
from cluster.promotion import newest_export, promote
from cluster.run_store import RunFolder, RunWriter
from data_service.errors import ConfigError
from data_service.prepare import prepare
from serve.app import AppArgs, spec_from_args
from tests.helpers.runs import write_run
from tests.helpers.written_parts import cut, make_state
from trainer.checkpoint import write_part
from trainer.export import read_provenance
from trainer.fragments import Fragment
from trainer.initialise import initial_tensor
from trainer.manifest import commit
from trainer.model import TransformerConfig, parameter_shapes


def commit_model(config: RunConfig, step: int) -> None:
    """A committed checkpoint of untrained weights; each step has its own."""
    dataset = prepare(config.data, config.dataset_uri)
    model = TransformerConfig.from_section(config.model, dataset.vocab_size, config.data.seq_len)
    shapes = parameter_shapes(model)
    flat = {name: initial_tensor(name, shape, step, model).flatten() for name, shape in shapes.items()}
    (own,) = cut(shapes, 1, None)
    fragments = [
        Fragment(
            one.name,
            one.kind,
            one.start,
            one.numel,
            flat[one.name][one.start : one.stop] if one.kind == "master" else torch.zeros(one.numel),
        )
        for one in own
    ]
    uri = RunFolder(config.root).checkpoints_uri
    commit(uri, step, 1, [write_part(uri, step, 1, 0, fragments)], make_state(shapes, step, model=asdict(model)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = write_run(tmp_path)
    config = load_config(path)
    commit_model(config, 4)
    commit_model(config, 8)
    return path


def test_what_export_wrote_is_found_by_generate_and_serve(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(file)
    with pytest.raises(ConfigError, match="no export yet"):
        newest_export(config)
    assert main(["export", str(file), "--step", "4"]) == 0
    uri = capsys.readouterr().out.strip()
    assert uri == RunFolder(config.root).export_uri(4)
    assert newest_export(config).uri == uri
    assert main(["generate", str(file), "--prompt", "sail", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == uri
    # a driver and a Serve configuration give the same fingerprint
    args = AppArgs.model_validate({"export_uri": f"{config.root}/export", "model_name": "m", "serve": config.serve})
    assert spec_from_args(args).digest == newest_export(config).digest


def test_the_promoted_export_goes_before_a_higher_step(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(file)
    assert main(["export", str(file), "--step", "8"]) == 0
    writer = RunWriter.open(config)
    try:
        writer.append_metrics({"step": 4, "eval": {"loss": 1.0}})
        writer.append_metrics({"step": 8, "eval": {"loss": 2.0}})
        writer.flush()
        promoted = promote(config, writer)
    finally:
        writer.close()
    event = RunFolder(config.root).events()[-1]
    assert (event["event"], event["step"]) == (Event.EXPORTED.value, 4)
    provenance = read_provenance(promoted.uri)
    assert provenance is not None
    assert event["digest"] == promoted.digest == provenance.digest
    assert newest_export(config) == promoted
    (Path(promoted.uri) / "model.safetensors").unlink()
    assert newest_export(config).step == 8
    shutil.rmtree(promoted.uri)
    assert newest_export(config).step == 8
    capsys.readouterr()


def test_export_writes_where_it_is_asked_to(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(file), "--step", "8", "--out", "elsewhere/model"]) == 0
    out = capsys.readouterr().out.strip()
    assert out == str(tmp_path / "elsewhere" / "model")
    assert main(["generate", "--model", out, "--prompt", "sail", "--max-tokens", "2"]) == 0
    assert main(["export", str(file), "--step", "4", "--out", "memory://bucket/model"]) == 0
    assert capsys.readouterr().out.strip().endswith("memory://bucket/model")
    found = read_provenance("memory://bucket/model")
    assert found is not None
    assert found.step == 4
    assert not (tmp_path / "memory:").exists()
