"""The run that the Kubernetes tests render: the example of the repository, moved to object storage or to a claim."""

import os
from pathlib import Path

import pytest

from cluster.config import RunConfig, load_config
from k8s.validate import CRD_VARIABLE, find_crd_folder

__all__ = ["CLAIM", "OBJECT_STORE", "REPOSITORY", "crd_folder", "example"]

REPOSITORY = Path(__file__).resolve().parents[2]

_COMMON = (
    "serve.api_key_env=STORMJIB_API_KEY",
    "k8s.secret_env=stormjib-env",
    "k8s.spot.node_selector={cloud.google.com/gke-spot: 'true'}",
    "k8s.spot.toleration_key=cloud.google.com/gke-spot",
)
OBJECT_STORE = (
    *_COMMON,
    "run.storage=s3://bucket/stormjib",
    "data.sources.0.path=s3://bucket/reviews.csv",
    "serve.replicas={min: 2, max: 4}",
)
"""Everything in a bucket; ranks on spot nodes above a floor of one."""
CLAIM = (
    "serve.api_key_env=STORMJIB_API_KEY",
    "k8s.secret_env=stormjib-env",
    "run.storage=/mnt/stormjib",
    "data.sources.0.path=/mnt/stormjib/reviews.csv",
    "k8s.storage_claim=stormjib",
    "cluster.node={slots: 2, cpus_per_slot: 1.5, gpus: 2}",
    "cluster.elastic=false",
    "k8s.mode=train",
)
"""Everything on a claim; GPU nodes, all on demand."""


def example(*overrides: str) -> RunConfig:
    """The example run with overrides."""
    return load_config(REPOSITORY / "examples" / "reviews.yaml", overrides)


def crd_folder() -> Path:
    """The folder with KubeRay's CRDs; skips the test, saying why, where there is none."""
    folder = find_crd_folder(REPOSITORY)
    if folder is None:
        pytest.skip(f"no KubeRay CRD files: {CRD_VARIABLE} is unset and {REPOSITORY.parent}{os.sep}shared has none")
    return folder
