"""Where pipelines are cut, and what DeepSpeed is told."""

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from data_service.errors import ConfigError
from trainer.config import ModelConfig, TrainConfig
from trainer.deepspeed_config import BufferSizes, engine_config, resolve_precision, working_stage
from trainer.layer_costs import measure_costs
from trainer.model import TransformerConfig, layers
from trainer.stages import LayerCosts, stage_bounds
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


@pytest.mark.parametrize(
    ("costs", "bounds"),
    [
        (LayerCosts(embedding=0, block=1, head=0), (0, 3, 5, 8)),
        (LayerCosts(embedding=0, block=1, head=2.5), (0, 3, 6, 8)),
        (LayerCosts(embedding=0, block=1, head=9), (0, 4, 6, 8)),
        (LayerCosts(embedding=2, block=1, head=0), (0, 2, 5, 8)),
    ],
)
def test_a_pipeline_is_cut_by_what_its_layers_cost(costs: LayerCosts, bounds: tuple[int, ...]) -> None:
    config = _config(6)
    found = stage_bounds(config, 3, costs)
    cost = [costs.embedding, *[costs.block] * 6, costs.head]
    assert max(sum(cost[slice(*cut)]) for cut in itertools.pairwise(found)) == max(
        sum(cost[slice(*cut)]) for cut in itertools.pairwise(bounds)
    )
    assert len(found) == 4


def test_costs_are_measured_and_told_in_blocks() -> None:
    """A head of 64 times a block's matrices is dearer than a block, whatever else the machine does."""
    config = _config(2, vocab_size=131072)
    costs = measure_costs(config, 2, 16, torch.device("cpu"), torch.float32, recompute=False)
    assert costs.block == 1.0
    assert costs.head > 2.0
    assert costs.head * 8 == int(costs.head * 8)


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
    found = engine_config(train, train.zero.stage, BatchLayout(32, dp, pp, "auto"), "fp32", BufferSizes(1001, 64))
    rows = found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * dp
    assert found["train_batch_size"] == rows >= 32
    assert found["zero_optimization"]["reduce_bucket_size"] % 2 == 0
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not found["bf16"]["enabled"]


def test_without_zero_the_engine_does_not_clip() -> None:
    train = TrainConfig.model_validate({"optimizer": {"grad_clip": 2.0}})
    clipped = {
        stage: engine_config(train, stage, BatchLayout(8, 1, 1), "fp32", BufferSizes(10, 2))["gradient_clipping"]
        for stage in (0, 2)
    }
    assert clipped == {0: 0.0, 2: 2.0}


def test_one_rank_in_fp32_has_nothing_to_partition() -> None:
    used = {stage: working_stage(stage, 1, "fp32", offloaded=False) for stage in range(4)}
    assert used == {0: 0, 1: 0, 2: 0, 3: 3}
    assert working_stage(1, 2, "fp32", offloaded=False) == 1
    assert working_stage(1, 1, "bf16", offloaded=False) == 1, "masters are for ZeRO to keep"
    assert working_stage(2, 1, "fp32", offloaded=True) == 2


def _told(device: str = "cpu", **sections: object) -> dict[str, Any]:
    train = TrainConfig.model_validate(sections)
    sizes = BufferSizes(10_000, 64)
    return engine_config(
        train, train.zero.stage, BatchLayout(8, 1, 1), resolve_precision(train, "cuda"), sizes, on_gpu=device == "cuda"
    )


def test_zero_3_keeps_vectors_whole_and_cuts_matrices() -> None:
    held = [nn.Parameter(torch.zeros(size)) for size in ((4, 6), (6,), (9,), (2, 2))]
    sizes = BufferSizes.of(held)
    assert sizes == BufferSizes(43, 9)
    train = TrainConfig.model_validate({"zero": {"stage": 3}})
    told = engine_config(train, train.zero.stage, BatchLayout(8, 1, 1), "fp32", sizes)["zero_optimization"]
    assert told["stage"] == 3
    assert told["stage3_param_persistence_threshold"] == 9


def test_offload_is_told_and_pages_are_pinned_beside_a_gpu_only() -> None:
    zero = _told()["zero_optimization"]
    assert "offload_optimizer" not in zero
    assert "offload_param" not in zero
    both = {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    for device, pinned in (("cpu", False), ("cuda", True)):
        told = _told(device, zero=both)
        assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": pinned}
        assert told["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": pinned}
        assert told["zero_force_ds_cpu_optimizer"] is False, "DeepSpeed's own would be compiled"


def test_fp16_scales_its_loss_and_is_for_gpus() -> None:
    told = _told(precision="fp16")
    assert told["fp16"]["enabled"]
    assert not told["bf16"]["enabled"]
    assert told["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(ConfigError, match="fp16 on CPUs"):
        resolve_precision(TrainConfig(precision="fp16"), "cpu")


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"parallel": {"pp": 2}, "zero": {"stage": 3}}, "zero.stage=3 with parallel.pp=2"),
        ({"zero": {"stage": 0, "offload_optimizer": "cpu"}}, "offload_optimizer=cpu with stage=0"),
        ({"zero": {"stage": 2, "offload_parameters": "cpu"}}, "offload_parameters=cpu with stage=2"),
        ({"parallel": {"pp": 2}, "zero": {"offload_optimizer": "cpu"}}, "zero.offload_optimizer=cpu with parallel.pp"),
        ({"parallel": {"pp": 2}, "precision": "fp16"}, "precision=fp16 with parallel.pp=2"),
        ({"zero": {"stage": 0}, "precision": "fp16"}, "zero.stage=0 with precision=fp16"),
        ({"device": "cpu", "precision": "fp16"}, "precision=fp16 with device=cpu"),
        ({"optimizer": {"name": "sgd", "momentum": 0, "nesterov": True}}, "nesterov=true with momentum=0"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, r"betas=\(0.9, 1.0\)"),
    ],
)
def test_what_cannot_work_is_refused_with_its_keys(sections: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        TrainConfig.model_validate(sections)
