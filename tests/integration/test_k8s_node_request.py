"""The run's driver asks for its nodes, on a cluster that was made for it only, and takes the request back."""

import tempfile
from collections.abc import Iterator

import pytest
import ray
from ray._private.worker import global_worker
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2

from cluster.node_request import node_bundles, requested_nodes
from k8s.render import render
from tests.helpers.k8s_run import OBJECT_STORE, example

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray whose node offers slots, as a rendered on-demand node does."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_enable_autoscaler_v2", "1")  # as the operator sets it on the head
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="sj") as short:
        ray.init(
            address="local",
            num_cpus=1,
            resources={"stormjib_slot": 2},
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _temp_dir=short,
        )
        try:
            yield
        finally:
            ray.shutdown()


def asked_for() -> list[dict[str, float]]:
    demands = get_cluster_status(global_worker.gcs_client.address).resource_demands.cluster_constraint_demand
    return [entry.bundle for demand in demands for entry in demand.bundles_by_count for _ in range(entry.count)]


def test_the_wanted_nodes_are_asked_for_as_long_as_the_run_goes_on(slots: None) -> None:
    assert is_autoscaler_v2()
    cluster = example(*OBJECT_STORE).cluster
    with requested_nodes(cluster):
        assert asked_for() == [{"stormjib_slot": 2.0}] * 3
    assert asked_for() == []


def test_a_cluster_of_others_is_not_resized() -> None:
    cluster = example(*OBJECT_STORE).cluster
    assert node_bundles(cluster, {"CPU": 64.0}) == []


def test_only_groups_that_hold_ranks_fit_the_request() -> None:
    config = example(*OBJECT_STORE)
    (bundle, *_) = node_bundles(config.cluster, {"stormjib_slot": 2.0})
    (job,) = [document for document in render(config) if document["kind"] == "RayJob"]
    fitting = [
        group["groupName"]
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        if all(float(group["resources"].get(key, 0)) >= amount for key, amount in bundle.items())
    ]
    assert fitting == ["spot-workers", "on-demand-workers"]
