"""Views of optimizer state: what is written, what is loaded, what is missed."""

import pytest
import torch
from torch import nn

from trainer.errors import CheckpointIncompleteError
from trainer.fragment_readers import (
    load_fragments,
    plain_views,
    read_fragments,
    wanted_ranges,
)
from trainer.fragments import KINDS, Fragment, coverage_problems
from trainer.optim import allocate_state, set_optimizer_steps
from trainer.stages import NamedParameter

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2), "d": (1,)}


def _held(seed: int) -> tuple[list[NamedParameter], torch.optim.AdamW]:
    torch.manual_seed(seed)
    held = [NamedParameter(name, nn.Parameter(torch.randn(shape)), True) for name, shape in SHAPES.items()]
    optimizer = torch.optim.AdamW([one.parameter for one in held], fused=True)
    allocate_state(optimizer, [one.parameter for one in held], KINDS)
    for state in optimizer.state.values():
        state["exp_avg"].normal_()
        state["exp_avg_sq"].uniform_()
    return held, optimizer


@pytest.mark.parametrize("dp", [1, 2, 3, 5, 40])
def test_every_element_is_written_once(dp: int) -> None:
    held, optimizer = _held(0)
    ranges = []
    for dp_index in range(dp):
        written = [fragment.range for fragment in read_fragments(plain_views(held, optimizer, dp_index, dp))]
        assert sum(one.numel for one in written) <= len(KINDS) * -(-27 // dp)
        ranges += written
    numels = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    assert coverage_problems(ranges, numels, KINDS) == []


def test_what_was_written_is_loaded_however_it_was_cut() -> None:
    held, optimizer = _held(0)
    others, other_optimizer = _held(1)
    pieces = [
        Fragment(f.name, f.kind, f.start + at, 1, f.data[at : at + 1])
        for dp_index in range(3)
        for f in read_fragments(plain_views(held, optimizer, dp_index, 3))
        for at in range(f.numel)
    ]
    load_fragments(plain_views(others, other_optimizer, 0, 1), reversed(pieces))
    for one, other in zip(held, others, strict=True):
        assert torch.equal(one.parameter, other.parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[one.parameter][key], other_optimizer.state[other.parameter][key])


def test_a_missing_piece_is_named() -> None:
    held, optimizer = _held(0)
    views = plain_views(held, optimizer, 0, 1)
    pieces = [fragment for fragment in read_fragments(views) if (fragment.name, fragment.kind) != ("b", "exp_avg")]
    with pytest.raises(CheckpointIncompleteError, match="exp_avg of b"):
        load_fragments(views, pieces)


def test_state_is_there_before_the_first_step() -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    allocate_state(optimizer, [parameter], KINDS)
    reference = nn.Parameter(torch.ones(4))
    plain = torch.optim.AdamW([reference], lr=0.1, fused=True)
    for steps in range(1, 4):
        for held, stepped in ((parameter, optimizer), (reference, plain)):
            held.grad = torch.full((4,), 0.5 * steps)
            stepped.step()
    assert torch.equal(parameter, reference)
    assert optimizer.state[parameter]["step"].item() == 3
    set_optimizer_steps(optimizer, 17)
    assert optimizer.state[parameter]["step"].item() == 17


def test_a_rank_wants_all_that_it_holds() -> None:
    held, optimizer = _held(0)
    wanted = wanted_ranges(plain_views(held, optimizer, 1, 2))
    assert sum(one.numel for one in wanted) == len(KINDS) * 27
