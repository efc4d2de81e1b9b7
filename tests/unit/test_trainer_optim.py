"""Schedules and parameter groups."""

import math

import pytest
import torch

from trainer.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from trainer.fragments import Kind
from trainer.model import Embedding, Transformer, TransformerConfig
from trainer.optim import (
    GroupKey,
    allocate_state,
    group_key,
    group_parameters,
    lr_at,
    make_optimizer,
    set_lr,
    state_kinds,
)


def _train(steps: int = 100, **schedule: object) -> TrainConfig:
    return TrainConfig(steps=steps, optimizer=OptimizerConfig(lr=2.0), schedule=ScheduleConfig.model_validate(schedule))


def test_warm_up_rises_linearly_and_starts_above_zero() -> None:
    for name in ("constant", "cosine", "linear", "wsd"):
        train = _train(name=name, warmup_steps=10)
        assert [lr_at(step, train) for step in range(10)] == pytest.approx([0.2 * step for step in range(1, 11)])
        assert lr_at(10, train) == 2.0


def test_constant() -> None:
    assert {lr_at(step, _train(name="constant")) for step in range(100)} == {2.0}


def test_cosine() -> None:
    train = _train(name="cosine", warmup_steps=20, min_lr_ratio=0.1)
    rates = [lr_at(step, train) for step in range(20, 100)]
    assert rates == sorted(rates, reverse=True)
    assert lr_at(60, train) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert lr_at(40, train) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert lr_at(99, train) > 0.2
    assert lr_at(100, train) == pytest.approx(0.2)
    assert lr_at(1000, train) == pytest.approx(0.2)


def test_wsd() -> None:
    train = _train(name="wsd", warmup_steps=5, decay_fraction=0.2)
    assert {lr_at(step, train) for step in range(5, 81)} == {2.0}
    assert [lr_at(step, train) for step in range(80, 100)] == pytest.approx([2.0 - 0.1 * step for step in range(20)])
    assert lr_at(99, train) > 0


def test_wsd_whose_decay_would_start_in_the_warm_up() -> None:
    train = _train(name="wsd", warmup_steps=60, decay_fraction=1.0)
    assert lr_at(60, train) == 2.0
    assert lr_at(80, train) == pytest.approx(1.0)


def test_warm_up_of_all_steps() -> None:
    assert lr_at(99, _train(name="cosine", warmup_steps=100)) == 2.0


def test_norms_are_not_decayed_and_no_group_is_empty() -> None:
    config = TransformerConfig.from_section(ModelConfig(d_model=32, num_layers=2, num_heads=4), 50, 8)
    section = OptimizerConfig(weight_decay=0.3)
    optimizer = make_optimizer(group_parameters(Transformer(config).named_parameters(), section), section)
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert others["weight_decay"] == 0.0
    assert len(others["params"]) == 5
    assert len(group_parameters(Embedding(config).named_parameters(), OptimizerConfig())) == 1


def test_tied_copies_count_once() -> None:
    config = TransformerConfig.from_section(ModelConfig(d_model=32, num_layers=1, num_heads=4), 50, 8)
    embedding = Embedding(config)
    named = [("embedding.weight", embedding.weight), ("embedding.weight", embedding.weight)]
    ((only,),) = group_parameters(named, OptimizerConfig()).values()
    assert only is embedding.weight


def test_linear_and_inverse_square_root_fall_as_they_say() -> None:
    linear = _train(name="linear", warmup_steps=10, min_lr_ratio=0.1)
    assert lr_at(10, linear) == pytest.approx(2.0)
    assert lr_at(55, linear) == pytest.approx(2.0 * 0.55)
    assert lr_at(100, linear) == pytest.approx(0.2)
    root = _train(name="inverse_sqrt", warmup_steps=16, min_lr_ratio=0.45)
    assert lr_at(15, root) == pytest.approx(2.0)
    assert lr_at(63, root) == pytest.approx(1.0)
    assert lr_at(99, root) == pytest.approx(0.9), "it does not fall below the least one"


def test_the_last_group_that_matches_counts() -> None:
    section = OptimizerConfig.model_validate(
        {
            "weight_decay": 0.3,
            "groups": [
                {"match": "blocks.*", "lr_scale": 0.5},
                {"match": "*.attention.q.*", "lr_scale": 2.0, "weight_decay": 0.0},
                {"match": "*norm*", "weight_decay": 0.7},
            ],
        }
    )
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    assert group_key("blocks.0.attention.k.weight", matrix, section) == GroupKey(0.5, 0.3)
    assert group_key("blocks.0.attention.q.weight", matrix, section) == GroupKey(2.0, 0.0)
    assert group_key("blocks.0.attention_norm.weight", vector, section) == GroupKey(1.0, 0.7)
    assert group_key("blocks.0.attention.q.bias", vector, section) == GroupKey(2.0, 0.0)
    assert group_key("embedding.weight", matrix, section) == GroupKey(1.0, 0.3)
    optimizer = make_optimizer(
        {GroupKey(0.5, 0.3): [matrix], GroupKey(2.0, 0.0): [vector]}, section.model_copy(update={"name": "sgd"})
    )
    set_lr(optimizer, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.0), (0.05, 0.3)]


def test_frozen_parameters_are_in_no_group() -> None:
    frozen, trained = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False), torch.nn.Parameter(torch.ones(2, 2))
    groups = group_parameters([("a", frozen), ("b", trained)], OptimizerConfig())
    assert [member for members in groups.values() for member in members] == [trained]


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({"name": "adamw"}, ("master", "exp_avg", "exp_avg_sq")),
        ({"name": "adam"}, ("master", "exp_avg", "exp_avg_sq")),
        ({"name": "sgd"}, ("master", "momentum_buffer")),
        ({"name": "sgd", "nesterov": True}, ("master", "momentum_buffer")),
        ({"name": "sgd", "momentum": 0.0}, ("master",)),
    ],
)
def test_state_that_is_there_from_the_start_changes_no_update(keys: dict[str, object], kinds: tuple[Kind, ...]) -> None:
    """Adam and SGD make the same updates as with the state that torch gives them at their first step."""
    section = OptimizerConfig.model_validate(keys)
    assert state_kinds(section) == kinds
    sides = []
    for allocated in (True, False):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
        optimizer = make_optimizer({GroupKey(1.0, 0.1): [parameter]}, section)
        if allocated:
            allocate_state(optimizer, [parameter], kinds)
            assert {"master", *optimizer.state[parameter]} - {"step"} == set(kinds)
        for step in range(4):
            parameter.grad = torch.full((2, 3), 0.5 * (step + 1)) * torch.linspace(1, 2, 6).view(2, 3)
            optimizer.step()
        sides.append(parameter.detach())
    assert torch.equal(*sides)
