"""Where ranks go: slots of nodes → a mesh whose pipelines stay on one node where they can.

Pure: it starts nothing, waits for nothing, and gives the same answer to the same slots in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.sections import ClusterConfig
from trainer.topology import Mesh

__all__ = ["NoPlacement", "Placement", "RankSlot", "place", "share_slots"]


@dataclass(frozen=True)
class RankSlot:
    """Where one rank runs."""

    node_id: str
    slot: int
    """Index among the ranks of this placement on the node; contiguous from 0."""


@dataclass(frozen=True)
class Placement:
    """A mesh and the slot of each of its ranks."""

    mesh: Mesh
    slots: tuple[RankSlot, ...]
    """Indexed by rank."""

    def node_of(self, rank: int) -> str:
        """Node id of a rank."""
        return self.slots[rank].node_id

    def slot_of(self, rank: int) -> int:
        """Slot of a rank on its node."""
        return self.slots[rank].slot

    def ranks_by_node(self) -> dict[str, tuple[int, ...]]:
        """Ranks of each node that holds any, nodes in the order of their first rank."""
        ranks: dict[str, list[int]] = {}
        for rank, place_ in enumerate(self.slots):
            ranks.setdefault(place_.node_id, []).append(rank)
        return {node: tuple(items) for node, items in ranks.items()}

    def describe(self) -> list[dict[str, int | str]]:
        """One record for each rank, ready for an event."""
        return [
            {"rank": rank, "node_id": place_.node_id, "slot": place_.slot} for rank, place_ in enumerate(self.slots)
        ]

    def describe_text(self, names: Mapping[str, str]) -> str:
        """For people: `node-1 (ranks 0, 1), node-2 (ranks 2, 3)`; a node without a name goes by its id."""
        parts = []
        for node, ranks in self.ranks_by_node().items():
            word = "rank" if len(ranks) == 1 else "ranks"
            parts.append(f"{names.get(node, node[:8])} ({word} {', '.join(map(str, ranks))})")
        return ", ".join(parts)


@dataclass(frozen=True)
class NoPlacement:
    """The nodes cannot hold the mesh."""

    reason: str
    """What was wanted, what is there, what to change."""


def place(
    slots: Mapping[str, int], dp: int | Literal["auto"], pp: int, *, at_least: int = 1
) -> Placement | NoPlacement:
    """Choose a data-parallel degree and a slot for every rank.

    Takes nodes in the order given. First as many pipelines as fit whole on one node; pipelines still missing then span
    the slots that are left, taken from the nodes with the most of them, so that a pipeline crosses few nodes. Surplus
    slots stay free.

    Args:
        slots: node id → ranks the node may hold.
        dp: the wanted degree; fewer pipelines are placed when the slots do not allow it. `auto` takes what they allow.
        pp: pipeline stages.
        at_least: the fewest pipelines that are worth placing.
    """
    total = sum(slots.values())
    degree = total // pp if dp == "auto" else min(dp, total // pp)
    fewest = max(1, at_least)
    if degree < fewest:
        return NoPlacement(
            f"train.parallel dp={fewest} x pp={pp} needs {fewest * pp} slots, and {len(slots)} live nodes give "
            f"{total}. Add nodes or slots, or lower the mesh."
        )
    free = dict(slots)
    used = dict.fromkeys(free, 0)
    ranks: list[RankSlot] = []

    def take(node_id: str) -> None:
        ranks.append(RankSlot(node_id, used[node_id]))
        used[node_id] += 1
        free[node_id] -= 1

    for node_id in free:
        while free[node_id] >= pp and len(ranks) < degree * pp:
            for _ in range(pp):
                take(node_id)
    while len(ranks) < degree * pp:
        fullest = max(free, key=lambda node_id: free[node_id])
        for _ in range(min(free[fullest], pp - len(ranks) % pp)):
            take(fullest)
    return Placement(Mesh(degree, pp), tuple(ranks))


def share_slots(capacity: Mapping[str, int], *, taken: int, config: ClusterConfig, mesh_slots: int) -> dict[str, int]:
    """How many slots a run takes on each new node.

    A node gives `cluster.node.slots` at most, so that a lost node costs no more than the user planned for. Only where
    the mesh would not fit that way (a cluster of one large machine) do nodes give more, in the order given.

    Args:
        capacity: node id to the slots its CPUs and GPUs allow.
        taken: slots the run holds already on other nodes.
        config: the `cluster` section.
        mesh_slots: slots of the mesh that was asked for.

    Returns:
        Node id to slots; nodes that give none are left out.
    """
    left = config.total_slots - taken
    shares: dict[str, int] = {}
    for node, slots in capacity.items():
        shares[node] = max(0, min(slots, config.node.slots, left))
        left -= shares[node]
    missing = mesh_slots - taken - sum(shares.values())
    for node, slots in capacity.items():
        more = max(0, min(slots - shares[node], missing))
        shares[node] += more
        missing -= more
    return {node: slots for node, slots in shares.items() if slots}
