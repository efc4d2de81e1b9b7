"""Schedules and parameter groups."""

import math

import pytest

from trainer.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from trainer.model import Embedding, Transformer, TransformerConfig
from trainer.optim import group_parameters, lr_at, make_optimizer


def _train(steps: int = 100, **schedule: object) -> TrainConfig:
    return TrainConfig(steps=steps, optimizer=OptimizerConfig(lr=2.0), schedule=ScheduleConfig.model_validate(schedule))


def test_warm_up_rises_linearly_and_starts_above_zero() -> None:
    for name in ("constant", "cosine", "wsd"):
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
