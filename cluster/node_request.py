"""Asks the autoscaler of a cluster that was made for one run for the nodes the run wants.

Agents and ranks are pinned to nodes that are there, so that they never make an autoscaler start one; this request does.
It also keeps nodes from being taken down while they idle, as they do while data are prepared.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from cluster.local_nodes import SLOT_RESOURCE
from cluster.sections import ClusterConfig

__all__ = ["node_bundles", "requested_nodes"]

_LOG = logging.getLogger(__name__)


def node_bundles(cluster: ClusterConfig, resources: Mapping[str, float]) -> list[dict[str, float]]:
    """What to ask for: a bundle for each wanted node; nothing on a cluster that was not made for runs.

    Ray has one such request for the whole cluster, and ours would replace another user's. A cluster whose nodes offer
    `stormjib_slot` was rendered for this run alone.

    Args:
        cluster: the section.
        resources: all resources that Ray's nodes offer now.
    """
    return [{SLOT_RESOURCE: cluster.node.slots}] * cluster.nodes if SLOT_RESOURCE in resources else []


@contextmanager
def requested_nodes(cluster: ClusterConfig) -> Iterator[None]:
    """Ask for the nodes of a run as long as the block runs. This process is connected to Ray."""
    resources: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]
    bundles = node_bundles(cluster, resources)
    if not bundles:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    _LOG.info("asking the autoscaler for %d nodes of %d slots", cluster.nodes, cluster.node.slots)
    request_resources(bundles=bundles)
    try:
        yield
    finally:
        if ray.is_initialized():
            request_resources(bundles=[])
