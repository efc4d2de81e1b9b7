"""What `k8s render` writes: equal to the golden files, restricted, and refused where pods could not run it.

After a change that is meant, write the golden files anew and read the difference:
`STORMJIB_WRITE_GOLDEN=1 python -m pytest tests/unit/test_k8s_render.py && git diff tests/golden/k8s`.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import cluster.local_nodes
import cluster.ray_session
from cluster.config import RunConfig, load_config
from cluster.console import RunConsole
from cluster.node_pool import NodePool
from cluster.ray_session import NodeView, Session
from cluster.run_store import RunWriter
from data_service.errors import ConfigError
from k8s.pods import ROLE_LABEL, SLOT_RESOURCE
from k8s.policies import RUN_AS_USER
from k8s.render import render, to_yaml
from k8s.validate import load_documents
from tests.helpers.k8s_run import CLAIM, OBJECT_STORE, REPOSITORY, example

GOLDEN = REPOSITORY / "tests" / "golden" / "k8s"
PROFILES = {"object-store": OBJECT_STORE, "claim": CLAIM}


def elided(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents without what other tests compare: the resolved configuration, its digest, Ray's version."""
    documents = load_documents(to_yaml(documents))
    for document in documents:
        if document["kind"] == "ConfigMap":
            document["data"]["run.yaml"] = "(the resolved configuration)"
        document["metadata"].get("annotations", {}).pop("stormjib/config-digest", None)
        spec = document.get("spec", {})
        for ray_cluster in (spec.get("rayClusterSpec"), spec.get("rayClusterConfig")):
            if ray_cluster is not None:
                ray_cluster["rayVersion"] = "(the version of Ray)"
        if "serveConfigV2" in spec:
            serve = yaml.safe_load(spec["serveConfigV2"])
            serve["applications"][0]["args"]["serve"] = "(the serve section)"
            spec["serveConfigV2"] = yaml.safe_dump(serve, sort_keys=False)
    return documents


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents:
        spec = document.get("spec", {})
        if "submitterPodTemplate" in spec:
            yield "submitter", spec["submitterPodTemplate"]
        ray_cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig")
        if ray_cluster is not None:
            yield "head", ray_cluster["headGroupSpec"]["template"]
            for group in ray_cluster["workerGroupSpecs"]:
                yield group["groupName"], group["template"]


def container_securities(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for _, template in pods(documents):
        for container in template["spec"]["containers"]:
            yield container["securityContext"]
    for document in documents:
        spec = document.get("spec", {})
        ray_cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig")
        if ray_cluster is not None:
            yield ray_cluster["autoscalerOptions"]["securityContext"]


@pytest.mark.parametrize("profile", PROFILES)
def test_rendered_documents_equal_the_golden_file(profile: str) -> None:
    path = GOLDEN / f"reviews-{profile}.yaml"
    text = to_yaml(elided(render(example(*PROFILES[profile]))))
    if os.environ.get("STORMJIB_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_config_map_holds_the_run_that_was_rendered(tmp_path: Path) -> None:
    config = example(*OBJECT_STORE)
    config_map = of_kind(render(config), "ConfigMap")
    file = tmp_path / "run.yaml"
    file.write_text(config_map["data"]["run.yaml"], encoding="utf-8")
    assert load_config(file) == config
    job = of_kind(render(config), "RayJob")
    assert job["metadata"]["annotations"]["stormjib/config-digest"] == config.digest()
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")


def test_every_ray_pod_reaches_the_store_as_the_run_does() -> None:
    settings = ("run.s3.endpoint_url=http://store:9000", "run.s3.region=eu-1")
    for settings_given, wanted in (
        (settings, {"STORMJIB_S3": '{"endpoint_url": "http://store:9000", "region": "eu-1"}'}),
        ((), {}),
    ):
        for name, template in pods(render(example(*OBJECT_STORE, *settings_given))):
            found = {one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]}
            assert {key: value for key, value in found.items() if key == "STORMJIB_S3"} == (
                {} if name == "submitter" else wanted
            )


def test_serve_application_gets_the_serve_section_and_an_open_host_behind_a_key() -> None:
    config = example(*OBJECT_STORE)
    serve = yaml.safe_load(of_kind(render(config), "RayService")["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["args"]["export_uri"] == "s3://bucket/stormjib/reviews-gpt/export"
    assert application["args"]["model_name"] == "reviews-gpt"
    expected = config.resolved()["serve"] | {"host": "0.0.0.0"}
    assert application["args"]["serve"] == expected
    assert expected["api_key_env"] == "STORMJIB_API_KEY"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_pod_is_restricted(profile: str) -> None:
    documents = render(example(*PROFILES[profile]))
    names = [name for name, _ in pods(documents)]
    assert names.count("head") == (2 if profile == "object-store" else 1)
    for name, template in pods(documents):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == RUN_AS_USER
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["enableServiceLinks"] is False
        assert spec.get("automountServiceAccountToken", True) is (name == "head")
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        allowed = {"emptyDir", "configMap", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
        for container in spec["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert not any("hostPort" in port for port in container.get("ports", ()))
    securities = list(container_securities(documents))
    assert len(securities) == len(names) + names.count("head")
    for security in securities:
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["readOnlyRootFilesystem"] is True
        assert "privileged" not in security


def test_every_pod_is_chosen_by_a_policy_that_denies_by_default() -> None:
    documents = render(example(*OBJECT_STORE))
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    for _, template in pods(documents):
        labels = template["metadata"]["labels"]
        chosen = [policy for policy in policies if policy["podSelector"]["matchLabels"].items() <= labels.items()]
        assert {kind for policy in chosen for kind in policy["policyTypes"]} == {"Ingress", "Egress"}
    addresses = [
        peer["ipBlock"]
        for policy in policies
        for rule in policy.get("egress", ())
        for peer in rule.get("to", ())
        if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
    ]
    assert addresses
    assert all(block["except"] == ["169.254.0.0/16"] for block in addresses)
    assert not [rule for policy in policies for rule in policy["ingress"] if not rule.get("from")]


def test_the_head_holds_no_work_and_stays_off_spot_nodes() -> None:
    documents = render(example(*OBJECT_STORE))
    for kind, field in (("RayJob", "rayClusterSpec"), ("RayService", "rayClusterConfig")):
        head = of_kind(documents, kind)["spec"][field]["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        terms = head["template"]["spec"]["affinity"]["nodeAffinity"]
        (term,) = terms["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert term["matchExpressions"] == [
            {"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}
        ]


def test_spot_comes_first_above_the_floor_of_an_elastic_run() -> None:
    spec = of_kind(render(example(*OBJECT_STORE)), "RayJob")["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    spot, on_demand = groups["spot-workers"], groups["on-demand-workers"]
    assert (spot["minReplicas"], spot["maxReplicas"]) == (0, 2)
    assert (on_demand["minReplicas"], on_demand["maxReplicas"]) == (1, 3)
    assert spot["priority"] > on_demand["priority"]
    assert spot["resources"] == on_demand["resources"] == {"CPU": "2", "stormjib_slot": "2"}
    assert spot["template"]["spec"]["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert "stormjib_slot" not in groups["data"]["resources"]


@pytest.mark.parametrize("profile", PROFILES)
def test_ray_nodes_of_the_groups_hold_the_slots_of_the_run(profile: str) -> None:
    config = example(*PROFILES[profile])
    session = Session(config.cluster, "head:6379", True, None)
    spec = of_kind(render(config), "RayJob")["spec"]["rayClusterSpec"]
    slots = {}
    for group in spec["workerGroupSpecs"]:
        record = {
            "NodeID": "f00",
            "NodeManagerAddress": "10.0.0.1",
            "Alive": True,
            "Resources": {key: float(value) for key, value in group["resources"].items()},
            "Labels": group["labels"],
        }
        slots[group["groupName"]] = session._view(record).slots
    assert slots.pop("data") == 0
    assert set(slots.values()) == {config.cluster.node.slots}
    assert (SLOT_RESOURCE, ROLE_LABEL) == (cluster.local_nodes.SLOT_RESOURCE, cluster.ray_session.ROLE_LABEL)


@dataclass(frozen=True)
class SeenNodes(Session):
    seen: tuple[NodeView, ...] = ()

    def nodes(self) -> list[NodeView]:
        return list(self.seen)


def test_data_workers_run_on_the_data_group_only(tmp_path: Path) -> None:
    config = example(*OBJECT_STORE, f"run.storage={tmp_path}")
    spec = of_kind(render(example(*OBJECT_STORE)), "RayJob")["spec"]["rayClusterSpec"]
    nodes = [
        NodeView(group["groupName"], f"10.0.0.{index}", True, 0, False, group["labels"])
        for index, group in enumerate(spec["workerGroupSpecs"])
    ]
    session = SeenNodes(config.cluster, "head:6379", True, None, tuple(nodes))
    with contextlib.closing(RunWriter.open(config)) as writer:
        pool = NodePool(config, session, writer, RunConsole(total_steps=1, quiet=True))
        assert pool.data_hosts() == {"data": "10.0.0.2"}


def test_a_run_that_is_not_elastic_has_all_nodes_on_demand_and_gpus_where_asked() -> None:
    spec = of_kind(render(example(*CLAIM)), "RayJob")["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert sorted(groups) == ["data", "on-demand-workers"]
    workers = groups["on-demand-workers"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (3, 3)
    assert workers["resources"] == {"CPU": "3", "stormjib_slot": "2", "GPU": "2"}
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert {"name": "run-storage", "mountPath": "/mnt/stormjib"} in container["volumeMounts"]


def test_a_pod_has_memory_for_the_replicas_that_ray_puts_there() -> None:
    one = engines(example(*OBJECT_STORE, "serve.cpus_per_replica=2"))
    four = engines(example(*OBJECT_STORE, "serve.cpus_per_replica=0.25"))
    assert one == ({"CPU": "2"}, {"cpu": "3", "memory": "4224Mi"})
    assert four == ({"CPU": "1"}, {"cpu": "2", "memory": "16512Mi"})


def engines(config: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
    (group,) = of_kind(render(config), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    return group["resources"], container["resources"]["limits"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "run.storage=.*is a folder of this machine.*k8s.storage_claim"),
        (("run.storage=s3://bucket/x",), r"data.sources.0.path=.*reviews.csv.*Put it in object storage"),
        (
            ("run.storage=/mnt/x", "k8s.storage_claim=c"),
            "data.sources.0.path=.*Put it under run.storage=/mnt/x",
        ),
        ((*OBJECT_STORE, "k8s.storage_claim=c"), "k8s.storage_claim=c with run.storage=s3://"),
        ((*OBJECT_STORE, "model.from=/models/base"), "model.from=/models/base"),
        ((*OBJECT_STORE, "data.sources.0.path=file:///reviews.csv"), "data.sources.0.path=file:"),
        ((*OBJECT_STORE, "data.chat_template=/chat.jinja"), "data.chat_template=/chat.jinja"),
        (
            (*OBJECT_STORE, "k8s.secret_env=null", "k8s.mode=train", "data.service.address=['data:50051']"),
            "data.service.address=data:50051 with k8s.secret_env=None",
        ),
        ((*OBJECT_STORE, "serve.api_key_env=null"), "would be open.*k8s.mode=train"),
        ((*OBJECT_STORE, "k8s.secret_env=null"), "would be open"),
        ((*OBJECT_STORE, "serve.port=0"), "serve.port=0"),
        ((*OBJECT_STORE, "run.name=1st-run"), "start with a letter"),
        ((*OBJECT_STORE, "k8s.namespace=Team_A"), "k8s.namespace=Team_A"),
        ((*OBJECT_STORE, "cluster.address=local"), "cluster.address=local"),
    ],
)
def test_what_pods_could_not_run_is_refused(overrides: tuple[str, ...], expected: str) -> None:
    config = example(*overrides)
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        render(config)


def test_a_training_run_needs_no_key() -> None:
    documents = render(example(*OBJECT_STORE, "serve.api_key_env=null", "k8s.mode=train"))
    assert "RayService" not in {document["kind"] for document in documents}


def test_serving_alone_renders_no_job() -> None:
    documents = render(example(*OBJECT_STORE, "k8s.mode=serve"))
    kinds = [document["kind"] for document in documents]
    assert "RayJob" not in kinds
    assert "RayService" in kinds
    engines = next(document for document in documents if document["metadata"]["name"] == "reviews-gpt-serve-engines")
    assert engines["spec"]["minAvailable"] == 1


def test_the_image_runs_as_the_user_of_the_pods_and_names_no_registry() -> None:
    lines = (REPOSITORY / "k8s" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert f"USER {RUN_AS_USER}:{RUN_AS_USER}" in lines
    images = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert images
    assert not any(re.search(r"[.:/].*/", image.replace("${PYTHON_VERSION}", "")) for image in images)
    assert any(line.startswith("ARG TORCH_INDEX_URL=") and line.endswith("/cpu") for line in lines)
    copied = [line.split()[1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    packages = {"data_service", "trainer", "serve", "cluster", "k8s"}
    assert packages < set(copied) | {"requirements-dev.lock"}
