"""Where ranks go: slots of nodes → a mesh whose pipelines stay on one node where they can.

Owns `NodeView`, what the runtime knows of a node, and the choice of degree and slots. Pure: it starts nothing, waits
for nothing, and gives the same answer to the same nodes in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.topology import Mesh

__all__ = ["NoPlacement", "NodeView", "Placement", "RankSlot", "place"]


@dataclass(frozen=True)
class NodeView:
    """A node as placement sees it."""

    node_id: str
    """Ray's node id in hex."""
    host: str
    """Address at which other nodes reach it."""
    alive: bool
    slots: int
    """Ranks it may hold; 0 for a node that holds none."""
    is_head: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's node labels."""


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
    nodes: Sequence[NodeView],
    dp: int | Literal["auto"],
    pp: int,
    *,
    min_dp: int = 1,
    max_slots: int | None = None,
) -> Placement | NoPlacement:
    """Choose a data-parallel degree and a slot for every rank.

    Takes nodes in the order given. First as many pipelines as fit whole on one node; pipelines still missing then span
    the slots that are left, taken from the nodes with the most of them, so that a pipeline crosses few nodes. Surplus
    slots stay free.

    Args:
        nodes: the nodes; dead ones and those without slots are passed over.
        dp: the wanted degree; fewer pipelines are placed when the slots do not allow it, down to `min_dp`. `auto`
            takes what the slots allow.
        pp: pipeline stages.
        min_dp: the fewest pipelines that are worth placing.
        max_slots: the most slots to use; None uses what the degree needs.
    """
    usable = [node for node in nodes if node.alive and node.slots > 0]
    total = sum(node.slots for node in usable)
    allowed = total if max_slots is None else min(total, max_slots)
    degree = allowed // pp if dp == "auto" else min(dp, allowed // pp)
    if degree < max(1, min_dp):
        limit = "" if max_slots is None or max_slots >= total else f", {max_slots} of them allowed"
        return NoPlacement(
            f"train.parallel dp={max(1, min_dp)} x pp={pp} needs {max(1, min_dp) * pp} slots, and "
            f"{len(usable)} live nodes give {total}{limit}. Add nodes or slots, or lower the mesh."
        )
    free = {node.node_id: node.slots for node in usable}
    used = dict.fromkeys(free, 0)
    slots: list[RankSlot] = []

    def take(node_id: str) -> None:
        slots.append(RankSlot(node_id, used[node_id]))
        used[node_id] += 1
        free[node_id] -= 1

    for node_id in free:
        while free[node_id] >= pp and len(slots) < degree * pp:
            for _ in range(pp):
                take(node_id)
    while len(slots) < degree * pp:
        fullest = max(free, key=lambda node_id: free[node_id])
        for _ in range(min(free[fullest], pp - len(slots) % pp)):
            take(fullest)
    return Placement(Mesh(degree, pp), tuple(slots))
