"""Placement: every mesh on every set of nodes, whole pipelines where they fit, and the loss of nodes."""

import itertools

import pytest

from cluster.placement import NoPlacement, Placement, place


def placed(slots: dict[str, int], dp: int | str, pp: int, at_least: int = 1) -> Placement:
    found = place(slots, dp, pp, at_least=at_least)  # type: ignore[arg-type]
    assert isinstance(found, Placement)
    return found


def test_fills_nodes_in_order_and_leaves_the_rest_free() -> None:
    found = placed({"a": 2, "b": 2, "c": 2}, 2, 2)
    assert (found.mesh.dp, found.mesh.pp) == (2, 2)
    assert found.ranks_by_node() == {"a": (0, 1), "b": (2, 3)}
    assert [found.slot_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert found.describe()[2] == {"rank": 2, "node_id": "b", "slot": 0}
    assert found.describe_text({"a": "node-1"}) == "node-1 (ranks 0, 1), b (ranks 2, 3)"


def test_loss_of_a_node_keeps_the_mesh_while_slots_last_then_shrinks_it() -> None:
    slots = {"a": 2, "b": 2, "c": 2}
    degrees = []
    for gone in ("b", "a"):
        slots.pop(gone)
        degrees.append(placed(slots, 2, 2).mesh.dp)
    assert degrees == [2, 1]
    assert isinstance(place({}, 2, 2), NoPlacement)


def test_pipelines_that_fit_no_node_cross_as_few_as_they_can() -> None:
    found = placed({"a": 3, "b": 1, "c": 3}, 1, 4)
    assert found.ranks_by_node() == {"a": (0, 1, 2), "c": (3,)}
    mixed = placed({"a": 3, "b": 3, "c": 2}, "auto", 2)
    assert mixed.mesh.dp == 4
    pipelines = [{mixed.node_of(rank) for rank in mixed.mesh.pipeline(index)} for index in range(4)]
    assert pipelines == [{"a"}, {"b"}, {"c"}, {"a", "b"}]


def test_reason_names_what_is_wanted_and_what_is_there() -> None:
    found = place({"a": 2}, 2, 2, at_least=2)
    assert isinstance(found, NoPlacement)
    assert "dp=2 x pp=2 needs 4 slots" in found.reason
    assert "1 live nodes give 2" in found.reason


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("dp", ["auto", 1, 2, 3, 5, 16])
def test_grid(dp: int | str, pp: int) -> None:
    for counts in itertools.product(range(4), repeat=4):
        slots = {f"n{index}": count for index, count in enumerate(counts)}
        found = place(slots, dp, pp)  # type: ignore[arg-type]
        total = sum(counts)
        degree = total // pp if dp == "auto" else min(int(dp), total // pp)
        if degree == 0:
            assert isinstance(found, NoPlacement)
            continue
        assert isinstance(found, Placement)
        assert found.mesh.dp == degree
        assert len(found.slots) == degree * pp
        assert len({(slot.node_id, slot.slot) for slot in found.slots}) == degree * pp
        by_node = found.ranks_by_node()
        assert all(len(ranks) <= slots[node] for node, ranks in by_node.items())
        for ranks in by_node.values():
            assert [found.slot_of(rank) for rank in ranks] == list(range(len(ranks)))
        whole = sum(
            1 for index in range(degree) if len({found.node_of(rank) for rank in found.mesh.pipeline(index)}) == 1
        )
        assert whole >= min(degree, sum(count // pp for count in counts))
