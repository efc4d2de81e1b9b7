"""Meshes and batch layouts: pure arithmetic, over every small case."""

import pytest

from data_service.errors import ConfigError
from trainer.topology import AUTO_MICRO_BATCH_ROWS, BatchLayout, Mesh

MESHES = [(dp, pp) for dp in range(1, 17) for pp in range(1, 17) if dp * pp <= 16]


@pytest.mark.parametrize(("dp", "pp"), MESHES)
def test_ranks_and_coordinates_are_inverse(dp: int, pp: int) -> None:
    mesh = Mesh(dp, pp)
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    assert coordinates == [(index, stage) for index in range(dp) for stage in range(pp)]
    assert [mesh.rank(*coordinate) for coordinate in coordinates] == list(range(dp * pp))


@pytest.mark.parametrize(("dp", "pp"), MESHES)
def test_consecutive_ranks_form_a_pipeline(dp: int, pp: int) -> None:
    mesh = Mesh(dp, pp)
    assert [rank for index in range(dp) for rank in mesh.pipeline(index)] == list(range(dp * pp))
    assert sorted(rank for stage in range(pp) for rank in mesh.stage_ranks(stage)) == list(range(dp * pp))
    for stage in range(pp):
        assert {mesh.coordinate(rank)[1] for rank in mesh.stage_ranks(stage)} == {stage}
    assert mesh.coordinate(mesh.reporter) == (0, pp - 1)


@pytest.mark.parametrize(("dp", "pp"), MESHES)
def test_every_slot_is_covered_once(dp: int, pp: int) -> None:
    for global_batch in (*range(1, 34), 48, 96, 250, 256):
        for micro_batch in ("auto", 1, 2, 3, 5, 8, 64):
            layout = BatchLayout(global_batch, dp, pp, micro_batch)
            slots = [slot for index in range(dp) for slot in range(*layout.slots(index))]
            assert slots == list(range(layout.num_slots))
            by_micro = [
                slot
                for index in range(dp)
                for micro in range(layout.num_micro_batches)
                for slot in range(*layout.micro_slots(index, micro))
            ]
            assert by_micro == slots
            assert global_batch <= layout.num_slots
            assert layout.slots_per_rank == layout.micro_batch * layout.num_micro_batches
            assert layout.slots_per_rank - layout.rows_per_rank < layout.micro_batch
            if micro_batch == "auto":
                assert layout.micro_batch <= AUTO_MICRO_BATCH_ROWS
                assert layout.num_micro_batches >= min(2 * pp if pp > 1 else 1, layout.rows_per_rank)
                assert layout.slots_per_rank - layout.rows_per_rank < layout.num_micro_batches
            else:
                assert layout.micro_batch <= micro_batch


def test_even_batches_have_no_masked_slot() -> None:
    for dp, pp in MESHES:
        layout = BatchLayout(16 * 8 * dp, dp, pp)
        assert layout.num_slots == layout.global_batch


def test_demo_mesh() -> None:
    layout = BatchLayout(32, dp=2, pp=2)
    assert (layout.micro_batch, layout.num_micro_batches, layout.slots(1)) == (4, 4, (16, 32))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 1, 1, "auto"), "global_batch=0"), ((8, 0, 1, "auto"), "dp=0"), ((8, 1, 1, 0), "micro_batch=0")],
)
def test_counts_below_one_are_refused(arguments: tuple[int, int, int, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        BatchLayout(*arguments)
