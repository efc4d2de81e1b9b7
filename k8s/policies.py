"""What keeps the rendered pods apart, up and unprivileged: security contexts, network policies, disruption budgets.

Owns the decisions; `k8s.pods` and `k8s.render` put them where they belong. Network policies are plain Kubernetes
objects because the operator's own `networkPolicy` field sits behind a feature gate that is off by default.
"""

from typing import Any

__all__ = [
    "CLIENTS_LABEL",
    "MONITORING_LABEL",
    "PART_LABEL",
    "RUN_LABEL",
    "RUN_AS_USER",
    "container_security",
    "disruption_budget",
    "network_policies",
    "part_labels",
    "pod_security",
]

RUN_LABEL = "stormjib/run"
"""Label of every pod of a run."""
PART_LABEL = "stormjib/part"
"""Label that tells the training pods (`train`) from the serving pods (`serve`) of a run."""
CLIENTS_LABEL = "stormjib/clients"
"""Label (`true`) of the namespaces whose pods may call the endpoint."""
MONITORING_LABEL = "stormjib/monitoring"
"""Label (`true`) of the namespaces whose pods may scrape metrics."""
RUN_AS_USER = 1000
"""User and group of every container; the image creates it."""

_DASHBOARD_PORT = 8265
_METRICS_PORT = 8080
_LINK_LOCAL = ("169.254.0.0/16", "fe80::/10")
_METADATA_V6 = "fd00:ec2::254/128"
_NODE_LOCAL_DNS = "169.254.20.10/32"

Document = dict[str, Any]


def part_labels(run: str, part: str) -> dict[str, str]:
    """Labels of the pods of one part (`train` or `serve`) of a run."""
    return {RUN_LABEL: run, PART_LABEL: part}


def pod_security() -> Document:
    """Pod-level settings that the Pod Security standard `restricted` asks for."""
    return {
        "runAsNonRoot": True,
        "runAsUser": RUN_AS_USER,
        "runAsGroup": RUN_AS_USER,
        "fsGroup": RUN_AS_USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Document:
    """Container-level settings of `restricted`, and a root file system that cannot be written."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def disruption_budget(namespace: str, name: str, labels: dict[str, str], min_available: int) -> Document:
    """Keep `min_available` pods through voluntary evictions.

    The budget is an integer `minAvailable`, the only form Kubernetes can work out for pods whose owner has no `scale`
    subresource; RayCluster has none.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"minAvailable": min_available, "selector": {"matchLabels": labels}},
    }


def network_policies(namespace: str, run: str, part: str, serve_port: int | None) -> list[Document]:
    """Deny everything to and from the pods of a part, then allow what it needs.

    Every pod talks to the pods of its own part, to DNS and over TLS to object storage, but not to link-local
    addresses, where clouds keep instance credentials. The head also hears the KubeRay operator and calls the
    Kubernetes API for the autoscaler. With `serve_port` the workers hear clients on that port.
    """
    labels = part_labels(run, part)
    own_pods = {"podSelector": {"matchLabels": labels}}
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    policies = [
        _policy(
            namespace,
            f"{run}-{part}-pods",
            labels,
            {},
            ingress=[
                {"from": [own_pods]},
                {"from": [_labelled_namespaces(MONITORING_LABEL)], "ports": _tcp(_METRICS_PORT)},
            ],
            egress=[{"to": [own_pods]}, _dns(), {"to": _outside(), "ports": _tcp(443)}],
        ),
        _policy(
            namespace,
            f"{run}-{part}-head",
            labels,
            {"ray.io/node-type": "head"},
            ingress=[{"from": [operator], "ports": _tcp(_DASHBOARD_PORT, *([serve_port] if serve_port else []))}],
            egress=[{"to": _outside(), "ports": _tcp(443, 6443)}],
        ),
    ]
    if serve_port is not None:
        policies.append(
            _policy(
                namespace,
                f"{run}-{part}-clients",
                labels,
                {"ray.io/node-type": "worker"},
                ingress=[{"from": [_labelled_namespaces(CLIENTS_LABEL)], "ports": _tcp(serve_port)}],
                egress=None,
            )
        )
    return policies


def _policy(
    namespace: str,
    name: str,
    labels: dict[str, str],
    narrower: dict[str, str],
    ingress: list[Document],
    egress: list[Document] | None,
) -> Document:
    spec: Document = {
        "podSelector": {"matchLabels": {**labels, **narrower}},
        "policyTypes": ["Ingress"] if egress is None else ["Ingress", "Egress"],
        "ingress": ingress,
    }
    if egress is not None:
        spec["egress"] = egress
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": spec,
    }


def _tcp(*ports: int) -> list[Document]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _labelled_namespaces(label: str) -> Document:
    return {"namespaceSelector": {"matchLabels": {label: "true"}}}


def _dns() -> Document:
    """The cluster's DNS pods, and the address of a node-local DNS cache."""
    return {
        "to": [
            {"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}},
            {"ipBlock": {"cidr": _NODE_LOCAL_DNS}},
        ],
        "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
    }


def _outside() -> list[Document]:
    """Every address but link-local ones and cloud metadata."""
    return [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": [_LINK_LOCAL[0]]}},
        {"ipBlock": {"cidr": "::/0", "except": [_LINK_LOCAL[1], _METADATA_V6]}},
    ]
