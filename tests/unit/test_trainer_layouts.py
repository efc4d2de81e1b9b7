"""A checkpoint of any layout loads into any other: all pairs, through real files, without engines."""

import functools
from pathlib import Path

import pytest
import torch

from tests.helpers import written_parts
from tests.helpers.written_parts import make_state
from tests.helpers.zero_layouts import GRID, Layout, views_of
from trainer.checkpoint import load_ranges, write_part
from trainer.config import ModelConfig
from trainer.errors import CheckpointIncompleteError
from trainer.fragment_readers import StateView, load_fragments, read_fragments, wanted_ranges
from trainer.fragments import KINDS, Fragment, Kind
from trainer.manifest import Manifest, commit
from trainer.model import TransformerConfig, parameter_shapes

STEP = 7
expected = functools.cache(written_parts.expected)
SGD: tuple[Kind, ...] = ("master", "momentum_buffer")


def _config(*, tied: bool) -> TransformerConfig:
    """Odd sizes: hardly a partition ends where a parameter does."""
    section = ModelConfig(d_model=12, num_layers=5, num_heads=3, d_ff=11, tie_embeddings=tied)
    return TransformerConfig.from_section(section, 37, 8)


def _whole(config: TransformerConfig, kinds: tuple[Kind, ...]) -> list[Fragment]:
    return [
        Fragment(name, kind, 0, torch.Size(shape).numel(), expected(name, kind, torch.Size(shape).numel(), STEP))
        for name, shape in parameter_shapes(config).items()
        for kind in kinds
    ]


def _written(folder: Path, layout: Layout, config: TransformerConfig, kinds: tuple[Kind, ...]) -> Manifest:
    """A checkpoint as the ranks of a layout write it; to commit it is to check that it covers everything once."""
    receipts = []
    for rank, views in enumerate(views_of(layout, config, kinds)):
        load_fragments(views, _whole(config, kinds))
        receipts.append(write_part(str(folder), STEP, 1, rank, read_fragments(views)))
    state = make_state(parameter_shapes(config), STEP, layout.dp, layout.pp, kinds=kinds)
    return commit(str(folder), STEP, 1, receipts, state)


def _assert_exact(views: list[StateView]) -> int:
    """Every view holds the values of its place; returns how many elements were compared."""
    for view in views:
        for kind, tensor in view.tensors.items():
            numel = view.start + view.numel
            whole = expected(view.name, kind, _NUMELS[view.name], STEP)
            assert torch.equal(tensor, whole[view.start : numel]), (view.name, kind, view.start)
    return sum(view.numel * len(view.tensors) for view in views)


_NUMELS = {
    name: torch.Size(shape).numel()
    for tied in (True, False)
    for name, shape in parameter_shapes(_config(tied=tied)).items()
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_layout_loads_into_every_other(tmp_path: Path, tied: bool) -> None:
    config = _config(tied=tied)
    numel = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    compared = 0
    for source in GRID:
        folder = tmp_path / str(source)
        manifest = _written(folder, source, config, KINDS)
        for target in GRID:
            per_rank = views_of(target, config, KINDS)
            for views in per_rank:
                load_fragments(views, load_ranges(str(folder), manifest, wanted_ranges(views)))
            elements = sum(_assert_exact(views) for views in per_rank)
            copies = target.dp if target.zero == 0 else 1
            tied_twice = _NUMELS["embedding.weight"] if tied and target.pp > 1 else 0
            assert elements == len(KINDS) * (copies * numel + tied_twice), (source, target)
            compared += 1
    assert compared == len(GRID) ** 2 == 256


def test_what_sgd_keeps_moves_as_well_and_no_other_kind_is_asked_for(tmp_path: Path) -> None:
    config = _config(tied=True)
    manifest = _written(tmp_path, Layout(1, 2, 2), config, SGD)
    for target in (Layout(3, 3), Layout(0, 2), Layout(1, 1, 4)):
        for views in views_of(target, config, SGD):
            load_fragments(views, load_ranges(str(tmp_path), manifest, wanted_ranges(views)))
            _assert_exact(views)
    adam = views_of(Layout(3, 3), config, KINDS)[0]
    with pytest.raises(CheckpointIncompleteError, match="exp_avg"):
        load_fragments(adam, load_ranges(str(tmp_path), manifest, wanted_ranges(adam)))


@pytest.mark.parametrize("layout", GRID, ids=str)
def test_ranks_of_a_layout_hold_even_shares(layout: Layout) -> None:
    """No rank of ZeRO 1 to 3 holds more than its share of its stage, but for the padding."""
    config = _config(tied=False)
    for stage in range(layout.pp):
        held = [
            sum(view.numel for view in views)
            for rank, views in enumerate(views_of(layout, config, KINDS))
            if rank % layout.pp == stage
        ]
        share = sum(held) / layout.dp
        slack = len(parameter_shapes(config)) if layout.zero == 3 else 4 * layout.dp
        assert max(held) <= share + slack
