"""What the RayService would run, run on a local Ray: the rendered Serve configuration, imported and deployed by Ray."""

import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import openai
import pytest
import ray
import yaml
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from k8s.render import render
from tests.helpers.k8s_run import REPOSITORY, example
from tests.helpers.tiny_model import CORPUS, make_model_folder

KEY_VARIABLE = "STORMJIB_TEST_KEY"


def rendered_configuration(storage: Path) -> ServeDeploySchema:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = example(
        f"run.storage={storage}",
        f"data.sources.0.path={storage}/reviews.csv",
        "k8s.storage_claim=stormjib",
        "k8s.secret_env=stormjib-env",
        "k8s.mode=serve",
        f"serve.api_key_env={KEY_VARIABLE}",
        f"serve.port={port}",
        "serve.kv_cache_tokens=4096",
    )
    (service,) = [document for document in render(config) if document["kind"] == "RayService"]
    options = yaml.safe_load(service["spec"]["serveConfigV2"])
    options["http_options"]["host"] = "127.0.0.1"
    return ServeDeploySchema.model_validate(options)


def write_export(storage: Path, step: int) -> None:
    export = storage / "reviews-gpt" / "export" / f"step_{step:08d}"
    shutil.copytree(make_model_folder(storage / f"source-{step}"), export)
    provenance = {"step": step, "attempt": 1, "digest": "0123456789abcdef", "dataset_digest": "x"}
    (export / "stormjib.json").write_text(json.dumps(provenance), encoding="utf-8")


@pytest.mark.timeout(180)
def test_the_rendered_configuration_serves_the_highest_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_export(tmp_path, 20)
    schema = rendered_configuration(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv(KEY_VARIABLE, "a key for this test")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="sj") as short:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _temp_dir=short,
        )
        try:
            ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=schema.http_options.port))
            # what the operator's PUT to the dashboard ends in; returns when the application runs, raises when it fails
            _get_global_client().deploy_apps(schema, _blocking=True)
            client = openai.OpenAI(
                base_url=f"http://127.0.0.1:{schema.http_options.port}/v1", api_key="a key for this test", max_retries=0
            )
            answer = client.completions.create(model="reviews-gpt", prompt=CORPUS[0], max_tokens=8, temperature=0)
            assert answer.system_fingerprint == "step-20-0123456789abcdef"
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="another").models.list()
            ray_serve.shutdown()
        finally:
            ray.shutdown()
