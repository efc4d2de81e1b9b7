"""Which export the application of a Serve configuration serves."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from data_service.errors import ConfigError
from k8s.render import APP_BUILDER, render
from serve.app import AppArgs, build, spec_from_args
from serve.config import ServeConfig
from tests.helpers.k8s_run import OBJECT_STORE, example


def export(root: Path, step: int, *, finished: bool = True) -> None:
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    if finished:
        provenance = {"step": step, "attempt": 1, "digest": f"d{step}", "dataset_digest": "x"}
        (folder / "stormjib.json").write_text(json.dumps(provenance), encoding="utf-8")


def arguments(root: Path, **changes: Any) -> AppArgs:
    return AppArgs.model_validate({"export_uri": str(root), "model_name": "m", "serve": ServeConfig(), **changes})


def test_the_highest_finished_step_is_served(tmp_path: Path) -> None:
    export(tmp_path, 50)
    export(tmp_path, 300)
    export(tmp_path, 400, finished=False)
    spec = spec_from_args(arguments(tmp_path))
    assert (spec.step, spec.digest, spec.device) == (300, "d300", "cpu")
    assert spec.model_uri == f"{tmp_path}/step_00000300"
    assert spec_from_args(arguments(tmp_path, step=50)).step == 50
    assert spec_from_args(arguments(tmp_path, serve=ServeConfig(gpus_per_replica=1))).device == "cuda"


@pytest.mark.parametrize(("step", "expected"), [(None, "an export; finished steps there: none"), (7, "step 7")])
def test_a_missing_export_is_named(tmp_path: Path, step: int | None, expected: str) -> None:
    export(tmp_path, 400, finished=False)
    with pytest.raises(ConfigError, match=expected):
        spec_from_args(arguments(tmp_path, step=step))


def test_a_key_that_is_not_set_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path, 300)
    monkeypatch.delenv("STORMJIB_API_KEY", raising=False)
    with pytest.raises(ConfigError):
        build(arguments(tmp_path, serve=ServeConfig(host="0.0.0.0", api_key_env="STORMJIB_API_KEY")))


def test_what_is_rendered_is_a_serve_configuration_with_our_arguments() -> None:
    config = example(*OBJECT_STORE, "k8s.serve_step=300")
    (service,) = [document for document in render(config) if document["kind"] == "RayService"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    assert application.import_path == APP_BUILDER == f"{build.__module__}:{build.__name__}"
    given = AppArgs.model_validate(application.args)
    assert (given.step, given.model_name) == (300, "reviews-gpt")
    assert given.serve.replicas == config.serve.replicas
    assert given.serve.host == "0.0.0.0"
