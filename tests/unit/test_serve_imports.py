import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "deepspeed", "transformers", "pyarrow")


def loaded_by(module: str) -> set[str]:
    code = f"import json, sys, {module}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("serve.spec", set()),
        ("serve.ingress", set()),
        ("serve.engine_deployment", set()),
        ("serve.weights", {"torch"}),
        ("serve.generate", {"torch"}),
    ],
)
def test_replicas_load_only_what_they_need(module: str, allowed: set[str]) -> None:
    assert loaded_by(module) <= allowed


def test_the_deployment_needs_no_torch_in_the_driver() -> None:
    assert not loaded_by("serve.deployment") & {"torch", "deepspeed", "transformers"}
