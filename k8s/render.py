"""A `RunConfig` as Kubernetes objects for KubeRay v1.7.

Owns which objects there are and what ties them together; pods are built in `k8s.pods`, policies in `k8s.policies`.
Pure: it reads nothing but the configuration and the installed version of Ray, and talks to no cluster. It refuses a run
whose files the pods could not reach, or whose endpoint would be open.
"""

import re
from importlib.metadata import version
from typing import Any

import yaml

from cluster.config import RunConfig, dump_yaml
from data_service.errors import ConfigError
from k8s.pods import (
    CONFIG_FOLDER,
    data_group,
    engine_group,
    head_group,
    scratch_mounts,
    submitter_template,
    training_groups,
)
from k8s.policies import container_security, disruption_budget, network_policies, part_labels

__all__ = ["APP_BUILDER", "MAX_NAME_LENGTH", "render", "to_yaml"]

APP_BUILDER = "serve.app:build"
"""Import path of the function that builds the Serve application from the arguments rendered here."""
MAX_NAME_LENGTH = 47
"""Longest name KubeRay takes for a RayJob or a RayService (ray-operator/controllers/ray/utils/constant.go)."""

_EVERY_ADDRESS = "0.0.0.0"
_JOB_RETRIES = 2
_TTL_AFTER_FINISHED_S = 600
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

Document = dict[str, Any]


def render(config: RunConfig) -> list[Document]:
    """The objects of a run, in the order in which to apply them.

    `k8s.mode=train` gives a ConfigMap with the resolved configuration, network policies, a disruption budget and a
    RayJob that prepares, trains and exports; `serve` gives policies, budgets and a RayService for what was exported;
    `all` gives both.

    Raises:
        ConfigError: a path is local to this machine and no claim makes it visible to the pods; the endpoint would be
            open; the run's name or namespace is no DNS label; or `cluster.address` names another cluster.
    """
    _check_names(config)
    _check_paths(config)
    _check_data_service(config)
    if config.cluster.address != "auto":
        raise ConfigError(
            f"cluster.address={config.cluster.address} with k8s render: a rendered job joins the Ray cluster it runs "
            "in. Set cluster.address=auto."
        )
    documents: list[Document] = []
    if config.k8s.mode in ("train", "all"):
        documents += _training(config)
    if config.k8s.mode in ("serve", "all"):
        _check_endpoint(config)
        documents += _serving(config)
    return documents


def to_yaml(documents: list[Document]) -> str:
    """The documents as one YAML stream, without anchors, long texts as blocks."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, explicit_start=True, width=120)


def _training(config: RunConfig) -> list[Document]:
    namespace, name = config.k8s.namespace, config.run.name
    labels = part_labels(name, "train")
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-run", "namespace": namespace, "labels": labels},
        "data": {"run.yaml": dump_yaml(config)},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "annotations": {"stormjib/config-digest": config.digest()},
        },
        "spec": {
            "entrypoint": f"python -m cluster run {CONFIG_FOLDER}/run.yaml --no-serve",
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": submitter_template(config),
            "backoffLimit": _JOB_RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _TTL_AFTER_FINISHED_S,
            "rayClusterSpec": _ray_cluster(config, "train", [*training_groups(config), data_group(config)]),
        },
    }
    head = {**labels, "ray.io/node-type": "head"}
    return [
        config_map,
        *network_policies(namespace, name, "train", None),
        disruption_budget(namespace, f"{name}-train-head", head, 1),
        job,
    ]


def _serving(config: RunConfig) -> list[Document]:
    namespace, name = config.k8s.namespace, config.run.name
    labels = part_labels(name, "serve")
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            "serveConfigV2": _serve_config(config),
            "excludeHeadPodFromServeSvc": True,
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterConfig": _ray_cluster(config, "serve", [engine_group(config)]),
        },
    }
    head = {**labels, "ray.io/node-type": "head"}
    engines = {**labels, "ray.io/node-type": "worker"}
    return [
        *network_policies(namespace, name, "serve", config.serve.port),
        disruption_budget(namespace, f"{name}-serve-head", head, 1),
        disruption_budget(namespace, f"{name}-serve-engines", engines, max(1, config.serve.replicas.min - 1)),
        service,
    ]


def _ray_cluster(config: RunConfig, part: str, groups: list[Document]) -> Document:
    """A RayCluster spec with token authentication and autoscaler v2.

    Without a `secretName` the operator makes a secret of its own, with a fresh token for each cluster. The autoscaler
    runs beside the head with the same image.
    """
    autoscaler = {
        "version": "v2",
        "upscalingMode": "Default",
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {
            "requests": {"cpu": "500m", "memory": "1Gi"},
            "limits": {"cpu": "500m", "memory": "1Gi"},
        },
        "securityContext": container_security(),
        "volumeMounts": scratch_mounts(),
    }
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": autoscaler,
        "headGroupSpec": head_group(config, part),
        "workerGroupSpecs": groups,
    }


def _serve_config(config: RunConfig) -> str:
    """Serve's own configuration, as the text that the operator sends to the dashboard.

    The application serves an export of the run; the proxies listen on every address because the network
    policy and the bearer key stand before them.
    """
    engine = config.serve.model_copy(update={"host": _EVERY_ADDRESS})
    application = {
        "name": config.run.name,
        "route_prefix": "/",
        "import_path": APP_BUILDER,
        "args": {
            "export_uri": f"{config.root}/export",
            "step": config.k8s.serve_step,
            "model_name": config.serve.model_name or config.run.name,
            "serve": engine.model_dump(mode="json", by_alias=True),
        },
    }
    options = {
        "proxy_location": "EveryNode",
        "http_options": {"host": _EVERY_ADDRESS, "port": config.serve.port},
        "applications": [application],
    }
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True)


def _check_names(config: RunConfig) -> None:
    name, namespace = config.run.name, config.k8s.namespace
    if not _DNS_1035.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise ConfigError(
            f"run.name={name}: KubeRay takes names of at most {MAX_NAME_LENGTH} lower-case letters, digits and dashes "
            "that start with a letter. Rename the run."
        )
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", namespace):
        raise ConfigError(f"k8s.namespace={namespace}: not a Kubernetes namespace name. Use letters, digits, dashes.")


def _check_paths(config: RunConfig) -> None:
    """Every file the run names must be visible to the pods: in object storage, or under the mounted claim."""
    storage, claim = config.run.storage, config.k8s.storage_claim
    if _is_remote(storage) and claim is not None:
        raise ConfigError(
            f"k8s.storage_claim={claim} with run.storage={storage}: object storage needs no claim. Remove "
            "k8s.storage_claim, or set run.storage to the path where the claim is to be mounted."
        )
    if not _is_remote(storage) and claim is None:
        raise ConfigError(
            f"run.storage={storage} is a folder of this machine, which pods cannot see. Set "
            "run.storage=s3://bucket/prefix, or k8s.storage_claim to a ReadWriteMany PersistentVolumeClaim that is "
            "then mounted at run.storage."
        )
    named = {f"data.sources.{index}.path": source.path for index, source in enumerate(config.data.sources)}
    optional = {
        "data.dataset": config.data.dataset,
        "data.tokenizer.path": config.data.tokenizer.path,
        "data.chat_template": config.data.chat_template,
        "model.from": config.model.from_,
    }
    named |= {key: path for key, path in optional.items() if path is not None}
    root = "" if _is_remote(storage) else storage.rstrip("/") + "/"
    for key, path in named.items():
        if _is_remote(path) or (root and path.startswith(root)):
            continue
        where = f"under run.storage={storage}" if root else "in object storage"
        raise ConfigError(
            f"{key}={path} is a path of this machine, which pods cannot see. Put it {where} and set {key} to it."
        )


def _check_data_service(config: RunConfig) -> None:
    """A data service that runs already wants its token."""
    if config.data.service.address and config.k8s.secret_env is None:
        raise ConfigError(
            f"data.service.address={', '.join(config.data.service.address)} with k8s.secret_env=None: the pods have no "
            "token for that service. Set k8s.secret_env to a Secret with the key STORMJIB_DATA_TOKEN."
        )


def _check_endpoint(config: RunConfig) -> None:
    serve = config.serve
    if serve.api_key_env is None or config.k8s.secret_env is None:
        raise ConfigError(
            f"serve.api_key_env={serve.api_key_env} with k8s.secret_env={config.k8s.secret_env}: the endpoint would be "
            "open to the cluster. Set k8s.secret_env to a Secret and serve.api_key_env to the key in it that holds "
            "the bearer key, or set k8s.mode=train."
        )
    if serve.port == 0:
        raise ConfigError("serve.port=0 with k8s render: a Service needs a fixed port. Set serve.port=8000.")


def _is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


class _Dumper(yaml.SafeDumper):
    """Writes equal objects twice instead of as anchors, and texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Never write an anchor."""
        return True


def _block_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block_text)
