"""The validator passes what is rendered and refuses each of many seeded mistakes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_service.errors import ConfigError
from k8s.render import render, to_yaml
from k8s.validate import CRD_VARIABLE, find_crd_folder, load_documents, validate
from tests.helpers.k8s_run import CLAIM, OBJECT_STORE, crd_folder, example

Documents = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder() -> Path:
    return crd_folder()


@pytest.fixture(scope="module")
def rendered() -> Documents:
    return load_documents(to_yaml(render(example(*OBJECT_STORE))))


def job(documents: Documents) -> dict[str, Any]:
    return next(document for document in documents if document["kind"] == "RayJob")


def service(documents: Documents) -> dict[str, Any]:
    return next(document for document in documents if document["kind"] == "RayService")


def cluster(documents: Documents) -> dict[str, Any]:
    return job(documents)["spec"]["rayClusterSpec"]


def head_pod(documents: Documents) -> dict[str, Any]:
    return cluster(documents)["headGroupSpec"]["template"]["spec"]


def spot(documents: Documents) -> dict[str, Any]:
    return cluster(documents)["workerGroupSpecs"][0]


def policy(documents: Documents) -> dict[str, Any]:
    return next(document for document in documents if document["kind"] == "NetworkPolicy")


def limits(documents: Documents) -> dict[str, Any]:
    return spot(documents)["template"]["spec"]["containers"][0]["resources"]["limits"]


MUTATIONS: dict[str, tuple[Callable[[Documents], object], str]] = {
    "misspelt field": (lambda d: spot(d).update(minReplica=1), "minReplica"),
    "misspelt pod field": (lambda d: head_pod(d).update(terminationGracePeriod=60), "terminationGracePeriod"),
    "enum": (lambda d: cluster(d)["autoscalerOptions"].update(version="v3"), "v3"),
    "authentication mode": (lambda d: cluster(d)["authOptions"].update(mode="none"), "none"),
    "type": (lambda d: spot(d).update(maxReplicas="2"), "maxReplicas"),
    "string map": (lambda d: spot(d)["resources"].update(CPU=2), "CPU"),
    "quantity": (lambda d: limits(d).update(memory="four"), "memory"),
    "API version": (lambda d: job(d).update(apiVersion="ray.io/v2"), "ray.io/v2"),
    "no head": (lambda d: cluster(d).pop("headGroupSpec"), "headGroupSpec"),
    "no container": (lambda d: head_pod(d).update(containers=[]), "container"),
    "min above max": (lambda d: spot(d).update(minReplicas=3, replicas=3), "exceeds maxReplicas"),
    "replicas out of bounds": (lambda d: spot(d).update(replicas=9), "outside"),
    "name too long": (lambda d: job(d)["metadata"].update(name="a" * 48), "at most 47"),
    "name with a dot": (lambda d: service(d)["metadata"].update(name="reviews.gpt"), "DNS-1035"),
    "restart policy": (lambda d: head_pod(d).update(restartPolicy="Always"), "restartPolicy"),
    "submitter restart policy": (
        lambda d: job(d)["spec"]["submitterPodTemplate"]["spec"].update(restartPolicy="Always"),
        "restartPolicy",
    ),
    "old Ray with a token": (lambda d: cluster(d).update(rayVersion="2.51.0"), "2.52.0"),
    "priority without v2": (lambda d: cluster(d)["autoscalerOptions"].pop("version"), "priority"),
    "resources twice": (lambda d: spot(d)["rayStartParams"].update({"num-cpus": "2"}), "rayStartParams"),
    "labels in start parameters": (lambda d: spot(d)["rayStartParams"].update(labels="a=b"), "labels"),
    "label value": (lambda d: spot(d)["labels"].update({"ray.io/market-type": "on demand"}), "on demand"),
    "group twice": (lambda d: spot(d).update(groupName="data"), "came before"),
    "mount without a volume": (lambda d: head_pod(d)["volumes"].pop(), "which is no volume"),
    "time to live without shutdown": (lambda d: job(d)["spec"].update(shutdownAfterJobFinishes=False), "shutdown"),
    "cluster field of another version": (
        lambda d: service(d)["spec"].update(rayClusterSpec=service(d)["spec"].pop("rayClusterConfig")),
        "rayClusterSpec",
    ),
    "no Serve application": (lambda d: service(d)["spec"].update(serveConfigV2="{}"), "applications"),
    "upgrade strategy": (lambda d: service(d)["spec"].update(upgradeStrategy={"type": "Rolling"}), "Rolling"),
    "network policy field": (lambda d: policy(d)["spec"].update(egres=[]), "egres"),
    "network policy port": (lambda d: policy(d)["spec"]["ingress"][1]["ports"][0].update(port=[8080]), "port"),
    "unknown kind": (lambda d: policy(d).update(kind="NetworkPolice"), "NetworkPolice"),
    "document twice": (lambda d: d.append(copy.deepcopy(policy(d))), "came before"),
}


@pytest.mark.parametrize("profile", [OBJECT_STORE, CLAIM], ids=["object-store", "claim"])
def test_rendered_documents_validate(profile: tuple[str, ...], folder: Path) -> None:
    documents = load_documents(to_yaml(render(example(*profile))))
    assert [str(problem) for problem in validate(documents, folder)] == []


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_mistake_is_found_and_named(mistake: str, rendered: Documents, folder: Path) -> None:
    documents = copy.deepcopy(rendered)
    mutate, word = MUTATIONS[mistake]
    mutate(documents)
    problems = [str(problem) for problem in validate(documents, folder)]
    assert any(word in problem for problem in problems), problems


def test_a_key_written_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="line 3: name appears twice"):
        load_documents("metadata:\n  name: a\n  name: b\n")


def test_text_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="mapping"):
        load_documents("- a\n")


def test_crd_folder_comes_from_the_variable_and_must_hold_crds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CRD_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=CRD_VARIABLE):
        find_crd_folder(tmp_path)
    (tmp_path / "ray.io_rayjobs.yaml").touch()
    assert find_crd_folder(tmp_path) == tmp_path
    monkeypatch.delenv(CRD_VARIABLE)
    assert find_crd_folder(tmp_path / "repository") is None
    with pytest.raises(ConfigError, match="no ray.io"):
        validate([], tmp_path / "repository")
