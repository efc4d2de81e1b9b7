"""What the KubeRay operator refuses when it reconciles an object, and no schema tells.

The rules are those of KubeRay v1.7 (ray-operator/controllers/ray/utils/validation.go and the Ray autoscaler's
ray/autoscaler/_private/kuberay/autoscaling_config.py), for the fields that this project renders.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

__all__ = ["operator_rules"]

_MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_CLUSTER_FIELD = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
_MIN_RAY_FOR_TOKEN = (2, 52)
_MIN_RAY_FOR_PRIORITY = (2, 56)
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")

Document = dict[str, Any]
Finding = tuple[str, str]


def operator_rules(document: Document) -> Iterator[Finding]:
    """(path, message) for each rule that a schema-valid `ray.io` document breaks."""
    kind, name, spec = document["kind"], document["metadata"]["name"], document["spec"]
    if kind not in _CLUSTER_FIELD:
        yield "kind", f"{kind} is not one that is rendered here"
        return
    if len(name) > _MAX_NAME[kind]:
        yield "metadata.name", f"{len(name)} characters; KubeRay takes at most {_MAX_NAME[kind]} for a {kind}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "metadata.name", f"{name!r} is no DNS-1035 label: start with a letter; use letters, digits, dashes"
    if kind == "RayJob":
        yield from _job(spec)
    if kind == "RayService":
        yield from _service(spec)
    path = ".".join(("spec", *_CLUSTER_FIELD[kind]))
    for key in _CLUSTER_FIELD[kind]:
        if key not in spec:
            return
        spec = spec[key]
    yield from _cluster(spec, path)


def _job(spec: Document) -> Iterator[Finding]:
    if "rayClusterSpec" not in spec and not spec.get("clusterSelector"):
        yield "spec", "one of rayClusterSpec and clusterSelector must be set"
    if not spec.get("entrypoint"):
        yield "spec.entrypoint", "empty: the job would run nothing"
    if spec.get("backoffLimit", 0) < 0:
        yield "spec.backoffLimit", "must not be negative"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.suspend", "needs shutdownAfterJobFinishes: true"
    if spec.get("submissionMode") == "SidecarMode" and "submitterPodTemplate" in spec:
        yield "spec.submitterPodTemplate", "SidecarMode takes none"
    if spec.get("submissionMode", "K8sJobMode") not in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"):
        yield "spec.submissionMode", f"{spec['submissionMode']!r} is unknown"
    template = spec.get("submitterPodTemplate")
    if template is not None and template["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
        yield "spec.submitterPodTemplate.spec.restartPolicy", "a Job's pods need Never or OnFailure"


def _service(spec: Document) -> Iterator[Finding]:
    strategy = (spec.get("upgradeStrategy") or {}).get("type")
    if strategy not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield "spec.upgradeStrategy.type", f"{strategy!r} is unknown"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "spec.rayClusterDeletionDelaySeconds", "must not be negative"
    try:
        serve = yaml.safe_load(spec.get("serveConfigV2", ""))
    except yaml.YAMLError as cause:
        yield "spec.serveConfigV2", f"not valid YAML: {cause}"
        return
    applications = serve.get("applications") if isinstance(serve, dict) else None
    if not applications:
        yield "spec.serveConfigV2", "names no applications"
        return
    for index, application in enumerate(applications):
        if not re.fullmatch(r"[\w.]+[:.]\w+", str(application.get("import_path", ""))):
            yield f"spec.serveConfigV2.applications.{index}.import_path", "must be module:attribute"


def _cluster(spec: Document, path: str) -> Iterator[Finding]:
    ray_version = _version(spec.get("rayVersion"))
    token = (spec.get("authOptions") or {}).get("mode") == "token"
    if token and (ray_version is None or ray_version < _MIN_RAY_FOR_TOKEN):
        yield f"{path}.rayVersion", f"{spec.get('rayVersion')}: token authentication needs Ray 2.52.0 or newer"
    options = spec.get("autoscalerOptions") or {}
    scales = bool(spec.get("enableInTreeAutoscaling"))
    second = scales and options.get("version") == "v2"
    head = spec["headGroupSpec"]
    yield from _group(head, f"{path}.headGroupSpec", second)
    if scales:
        containers = head["template"]["spec"]["containers"]
        if any(
            variable["name"] == "RAY_enable_autoscaler_v2" for each in containers for variable in each.get("env", ())
        ):
            yield f"{path}.headGroupSpec", "RAY_enable_autoscaler_v2 and autoscalerOptions.version are both set"
    names: set[str] = set()
    for index, group in enumerate(spec.get("workerGroupSpecs", ())):
        place = f"{path}.workerGroupSpecs.{index}"
        if group["groupName"] in names:
            yield f"{place}.groupName", f"{group['groupName']} came before"
        names.add(group["groupName"])
        yield from _group(group, place, second)
        if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31 - 1):
            yield f"{place}.minReplicas", f"{group['minReplicas']} exceeds maxReplicas={group['maxReplicas']}"
        elif not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 2**31 - 1):
            yield f"{place}.replicas", f"{group.get('replicas', 0)} is outside minReplicas and maxReplicas"
        if scales and group.get("suspend"):
            yield f"{place}.suspend", "a group cannot be suspended while the autoscaler runs"
        for field in ("idleTimeoutSeconds", "priority"):
            if field in group and not second:
                yield f"{place}.{field}", "needs enableInTreeAutoscaling: true and autoscalerOptions.version: v2"
        if "priority" in group and (ray_version is None or ray_version < _MIN_RAY_FOR_PRIORITY):
            yield f"{place}.priority", "needs an explicit rayVersion of 2.56.0 or newer"


def _group(group: Document, path: str, second: bool) -> Iterator[Finding]:
    pod = group["template"]["spec"]
    if not pod.get("containers"):
        yield f"{path}.template.spec.containers", "at least one container is needed"
    if second and pod.get("restartPolicy", "Never") != "Never":
        yield f"{path}.template.spec.restartPolicy", "must be Never or absent with autoscaler v2"
    params = group.get("rayStartParams", {})
    if group.get("resources") and any(params.get(key) for key in _RESOURCE_PARAMS):
        yield f"{path}.resources", "set in rayStartParams as well; use one of the two"
    if "labels" in params:
        yield f"{path}.rayStartParams.labels", "belongs in the group's labels"
    for key, value in group.get("labels", {}).items():
        prefix, slash, name = key.rpartition("/")
        if not _LABEL_NAME.fullmatch(name) or (slash and not _LABEL_PREFIX.fullmatch(prefix)):
            yield f"{path}.labels", f"{key!r} is no label key"
        if value and not _LABEL_NAME.fullmatch(value):
            yield f"{path}.labels.{key}", f"{value!r} is no label value"
    yield from _volumes(pod, path)


def _volumes(pod: Document, path: str) -> Iterator[Finding]:
    """Every mount names a volume of its pod (the API server checks it; the schema cannot)."""
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    for container in (*pod.get("initContainers", ()), *pod.get("containers", ())):
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                yield f"{path}.template.spec", f"{container['name']} mounts {mount['name']}, which is no volume"


def _version(text: str | None) -> tuple[int, int] | None:
    match = re.match(r"v?(\d+)\.(\d+)", text or "")
    return (int(match[1]), int(match[2])) if match else None
