"""Where pipelines are cut, and what DeepSpeed is told."""

import itertools

import pytest

from data_service.errors import ConfigError
from trainer.config import ModelConfig, TrainConfig
from trainer.deepspeed_config import engine_config, resolve_precision
from trainer.model import TransformerConfig, layers
from trainer.stages import stage_bounds
from trainer.topology import BatchLayout


def _config(num_layers: int, vocab_size: int = 512) -> TransformerConfig:
    section = ModelConfig(d_model=64, num_layers=num_layers, num_heads=4)
    return TransformerConfig.from_section(section, vocab_size, 32)


def _costs(config: TransformerConfig) -> list[int]:
    block = 4 * config.d_model**2 + 3 * config.d_model * config.d_ff + 2 * config.d_model
    cost = {"embedding": 0, "block": block, "head": config.vocab_size * config.d_model}
    return [cost[layer.kind] for layer in layers(config)]


@pytest.mark.parametrize(("num_layers", "pp"), [(n, p) for n in (1, 2, 3, 6, 7) for p in range(1, n + 1)])
@pytest.mark.parametrize("vocab_size", [64, 512, 4096])
def test_the_cut_is_the_best_one(num_layers: int, pp: int, vocab_size: int) -> None:
    config = _config(num_layers, vocab_size)
    costs, bounds = _costs(config), stage_bounds(config, pp)
    assert bounds[0] == 0
    assert bounds[-1] == num_layers + 2
    assert list(bounds) == sorted(set(bounds))

    def dearest(cuts: tuple[int, ...]) -> int:
        return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(cuts))

    inner = range(2, num_layers + 1)
    assert dearest(bounds) == min(dearest((0, *cuts, num_layers + 2)) for cuts in itertools.combinations(inner, pp - 1))
    kinds = [{layers(config)[i].kind for i in range(*cut)} for cut in itertools.pairwise(bounds)]
    assert all("block" in kind for kind in kinds)


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.parallel.pp=3 with model.num_layers=2"):
        stage_bounds(_config(2), 3)


def test_precision_auto_depends_on_the_device() -> None:
    assert resolve_precision(TrainConfig(), "cpu") == "fp32"
    assert resolve_precision(TrainConfig(), "cuda") == "bf16"
    without_zero = TrainConfig.model_validate({"zero": {"stage": 0}})
    assert resolve_precision(without_zero, "cuda") == "fp32"
    assert resolve_precision(TrainConfig(precision="bf16"), "cpu") == "bf16"


@pytest.mark.parametrize(("dp", "pp"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 4), (5, 2)])
def test_batch_sizes_are_what_the_engine_asserts(dp: int, pp: int) -> None:
    train = TrainConfig.model_validate({"parallel": {"dp": dp, "pp": pp}, "global_batch": 32})
    found = engine_config(train, BatchLayout(32, dp, pp, "auto"), "fp32", 1001)
    rows = found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * dp
    assert found["train_batch_size"] == rows >= 32
    assert found["zero_optimization"]["reduce_bucket_size"] % 2 == 0
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not found["bf16"]["enabled"]


def test_without_zero_the_engine_does_not_clip() -> None:
    train = TrainConfig.model_validate({"zero": {"stage": 0}, "optimizer": {"grad_clip": 2.0}})
    assert engine_config(train, BatchLayout(8, 1, 1), "fp32", 10)["gradient_clipping"] == 0.0
    train = TrainConfig.model_validate({"zero": {"stage": 2}, "optimizer": {"grad_clip": 2.0}})
    assert engine_config(train, BatchLayout(8, 1, 1), "fp32", 10)["gradient_clipping"] == 2.0
