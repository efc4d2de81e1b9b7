"""Pod templates and KubeRay worker groups of a run.

Owns how big a pod is, where it may land, what it mounts and which Ray resources its node offers. It decides nothing
about how many pods there are over time: that is the autoscaler's, between the bounds written here.
"""

import math
from typing import Any

from cluster.config import RunConfig
from k8s.policies import container_security, part_labels, pod_security

__all__ = [
    "CONFIG_FOLDER",
    "ROLE_LABEL",
    "SLOT_RESOURCE",
    "data_group",
    "engine_group",
    "head_group",
    "scratch_mounts",
    "scratch_volumes",
    "submitter_template",
    "training_groups",
]

CONFIG_FOLDER = "/etc/stormjib"
"""Where the ConfigMap with `run.yaml` is mounted."""
SLOT_RESOURCE = "stormjib_slot"
"""Ray resource of which a node offers one for each rank it can hold."""
ROLE_LABEL = "stormjib/role"
"""Ray node label (and pod label) of what a group is for: `ranks`, `data` or `engines`."""

_SPOT_PRIORITY, _ON_DEMAND_PRIORITY = 10, 0
_SCRATCH_PATH = "/tmp"
_SHM_NAME, _SCRATCH_NAME, _CONFIG_NAME, _STORAGE_NAME = "shm", "scratch", "run-config", "run-storage"
_IDLE_TIMEOUT_S = 120
_DO_NOT_EVICT = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}

Document = dict[str, Any]


def head_group(config: RunConfig, part: str) -> Document:
    """The head: on demand, without logical CPUs, so that no task, rank or replica lands on it."""
    size = config.k8s.head
    container = _ray_container("ray-head", config, part, size.cpus, size.memory_bytes, gpus=0)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
        {"name": "metrics", "containerPort": 8080},
    ]
    template = _template(config, part, container, spot=False, gpus=0, keeps_token=True)
    return {
        "rayStartParams": {"num-cpus": "0", "object-store-memory": str(config.cluster.object_store_bytes)},
        "template": template,
    }


def training_groups(config: RunConfig) -> list[Document]:
    """The groups that hold ranks: spot first, on demand where spot is short.

    The floor of on-demand pods is what the run cannot go on without: `cluster.min_nodes`, or all nodes of a run that
    is not elastic. Above it the autoscaler follows the nodes the controller asks for and takes spot while it gets any.
    """
    nodes, node = config.cluster.nodes, config.cluster.node
    floor = config.cluster.min_nodes if config.cluster.elastic else nodes
    spot_nodes = nodes - floor if config.k8s.spot.node_selector else 0
    cpus = math.ceil(node.slots * node.cpus_per_slot)
    memory_bytes = node.slots * config.k8s.slot_memory_bytes + config.cluster.object_store_bytes
    resources = {"CPU": str(cpus), SLOT_RESOURCE: str(node.slots)}
    if node.gpus:
        resources["GPU"] = str(node.gpus)
    groups = []
    if spot_nodes:
        container = _ray_container("ray-worker", config, "train", cpus, memory_bytes, node.gpus)
        template = _template(config, "train", container, spot=True, gpus=node.gpus)
        groups.append(_group("spot-workers", template, 0, spot_nodes, resources, "spot", "ranks", config))
    container = _ray_container("ray-worker", config, "train", cpus, memory_bytes, node.gpus)
    template = _template(config, "train", container, spot=False, gpus=node.gpus)
    groups.append(_group("on-demand-workers", template, floor, nodes, resources, "on-demand", "ranks", config))
    return groups


def data_group(config: RunConfig) -> Document:
    """The CPU group of the data service and of the preparation tasks; it offers no slots."""
    size = config.k8s.data
    container = _ray_container("ray-worker", config, "train", size.cpus, size.memory_bytes, gpus=0)
    resources = {"CPU": str(size.cpus)}
    count = config.k8s.data_nodes
    template = _template(config, "train", container, spot=False, gpus=0)
    return _group("data", template, count, count, resources, "on-demand", "data", config)


def engine_group(config: RunConfig) -> Document:
    """Pods for engine replicas: one in a pod, or as many as fit where a replica takes a share of a CPU.

    A pod has one CPU more than its Ray node offers, for the HTTP proxy and the ingress, which ask Ray for none.
    """
    serve = config.serve
    cpus, gpus = math.ceil(serve.cpus_per_replica), math.ceil(serve.gpus_per_replica)
    fitting = max(1, int(cpus / serve.cpus_per_replica))
    memory_bytes = fitting * config.k8s.replica_memory_bytes + config.cluster.object_store_bytes
    container = _ray_container("ray-worker", config, "serve", cpus + 1, memory_bytes, gpus)
    container["ports"] = [
        {"name": "serve", "containerPort": serve.port},
        {"name": "metrics", "containerPort": 8080},
    ]
    resources = {"CPU": str(cpus)} | ({"GPU": str(gpus)} if gpus else {})
    template = _template(config, "serve", container, spot=False, gpus=gpus)
    bounds = serve.replicas
    return _group("engines", template, bounds.min, bounds.max, resources, "on-demand", "engines", config)


def submitter_template(config: RunConfig) -> Document:
    """The pod that runs `ray job submit` and follows the log; the operator fills in its command."""
    container = {
        "name": "ray-job-submitter",
        "image": config.k8s.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "HOME", "value": _SCRATCH_PATH}],
        "resources": _resources(1, 2**30, 0),
        "securityContext": container_security(),
        "volumeMounts": scratch_mounts(),
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": scratch_volumes(),
    }
    affinity = _on_demand_affinity(config)
    if affinity is not None:
        spec["affinity"] = affinity
    return {"metadata": {"labels": part_labels(config.run.name, "train")}, "spec": spec}


def scratch_volumes() -> list[Document]:
    """The only place of the file system, beside storage and shared memory, that a pod may write."""
    return [{"name": _SCRATCH_NAME, "emptyDir": {}}]


def scratch_mounts() -> list[Document]:
    """Where a container sees the scratch volume; Ray keeps its session there and HOME points to it."""
    return [{"name": _SCRATCH_NAME, "mountPath": _SCRATCH_PATH}]


def _group(
    name: str,
    template: Document,
    floor: int,
    most: int,
    resources: dict[str, str],
    market: str,
    role: str,
    config: RunConfig,
) -> Document:
    return {
        "groupName": name,
        "replicas": floor,
        "minReplicas": floor,
        "maxReplicas": most,
        "idleTimeoutSeconds": _IDLE_TIMEOUT_S,
        "priority": _SPOT_PRIORITY if market == "spot" else _ON_DEMAND_PRIORITY,
        "labels": {"ray.io/market-type": market, ROLE_LABEL: role},
        "resources": resources,
        "rayStartParams": {"object-store-memory": str(config.cluster.object_store_bytes)},
        "template": template,
    }


def _ray_container(name: str, config: RunConfig, part: str, cpus: int, memory_bytes: int, gpus: int) -> Document:
    mounts = [*scratch_mounts(), {"name": _SHM_NAME, "mountPath": "/dev/shm"}]
    if part == "train":
        mounts.append({"name": _CONFIG_NAME, "mountPath": CONFIG_FOLDER, "readOnly": True})
    if config.k8s.storage_claim is not None:
        mounts.append({"name": _STORAGE_NAME, "mountPath": config.run.storage})
    variables = {"HOME": _SCRATCH_PATH, **config.run.s3.environment}
    container: Document = {
        "name": name,
        "image": config.k8s.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "resources": _resources(cpus, memory_bytes, gpus),
        "securityContext": container_security(),
        "volumeMounts": mounts,
    }
    if config.k8s.secret_env is not None:
        container["envFrom"] = [{"secretRef": {"name": config.k8s.secret_env}}]
    return container


def _template(
    config: RunConfig, part: str, container: Document, *, spot: bool, gpus: int, keeps_token: bool = False
) -> Document:
    """A pod of the run; only the head keeps a service account token, for the autoscaler beside it."""
    shm = {"medium": "Memory", "sizeLimit": _quantity(config.cluster.object_store_bytes + 2**28)}
    volumes = [*scratch_volumes(), {"name": _SHM_NAME, "emptyDir": shm}]
    if part == "train":
        volumes.append({"name": _CONFIG_NAME, "configMap": {"name": f"{config.run.name}-run"}})
    if config.k8s.storage_claim is not None:
        claim = {"claimName": config.k8s.storage_claim}
        volumes.append({"name": _STORAGE_NAME, "persistentVolumeClaim": claim})
    spec: Document = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.k8s.termination_grace_s,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": volumes,
    }
    if not keeps_token:
        spec["automountServiceAccountToken"] = False
    tolerations: list[Document] = []
    if spot:
        spec["nodeSelector"] = dict(config.k8s.spot.node_selector)
        if config.k8s.spot.toleration_key is not None:
            tolerations.append({"key": config.k8s.spot.toleration_key, "operator": "Exists"})
    else:
        affinity = _on_demand_affinity(config)
        if affinity is not None:
            spec["affinity"] = affinity
    if gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        spec["tolerations"] = tolerations
    metadata: Document = {"labels": part_labels(config.run.name, part)}
    if keeps_token or (part == "train" and not spot):
        metadata["annotations"] = dict(_DO_NOT_EVICT)
    return {"metadata": metadata, "spec": spec}


def _on_demand_affinity(config: RunConfig) -> Document | None:
    """Keeps a pod off spot nodes; a node that lacks the label altogether will do."""
    selector = config.k8s.spot.node_selector
    if not selector:
        return None
    expressions = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in sorted(selector.items())]
    terms = [{"matchExpressions": expressions}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _resources(cpus: int, memory_bytes: int, gpus: int) -> Document:
    amounts = {"cpu": str(cpus), "memory": _quantity(memory_bytes)}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _quantity(size_bytes: int) -> str:
    """Bytes as a Kubernetes quantity, in the largest binary unit that is exact."""
    for exponent, unit in ((3, "Gi"), (2, "Mi"), (1, "Ki")):
        if size_bytes % 1024**exponent == 0:
            return f"{size_bytes // 1024**exponent}{unit}"
    return str(size_bytes)
