"""The planner: pieces of memory against what autograd and the shapes say, rows against the rules, advice."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from data_service.errors import ConfigError
from trainer.architecture import TransformerConfig
from trainer.config import ModelConfig, TrainConfig
from trainer.deepspeed_config import resolve_precision
from trainer.losses import projected_cross_entropy
from trainer.model import Transformer
from trainer.planner.activations import block_pieces, edge_pieces, output_gradient_bytes, total_bytes
from trainer.planner.advice import DataFacts, advise
from trainer.planner.memory import Setting, stage_shapes
from trainer.planner.rows import PlanRow, PlanTask, best_row, plan_rows, row_of, wanted_setting
from trainer.planner.speed import DeviceSpeed, traffic_bytes
from trainer.stages import stage_bounds
from trainer.throughput import flops_per_token, matrix_parameters
from trainer.topology import BatchLayout

VOCAB, SEQ_LEN = 500, 32
SLOW = DeviceSpeed(1e12, 0.5, 1e9, is_gpu=False, source="made up")


def model(**shape: Any) -> TransformerConfig:
    section = ModelConfig.model_validate({"d_model": 32, "num_layers": 4, "num_heads": 2, **shape})
    return TransformerConfig.from_section(section, VOCAB, SEQ_LEN)


def task(slots: int = 4, memory: int | None = None, config: TransformerConfig | None = None, **train: Any) -> PlanTask:
    return PlanTask(
        train=TrainConfig.model_validate({"global_batch": 16, **train}),
        model=config or model(),
        seq_len=SEQ_LEN,
        slots=slots,
        device="cpu",
        precision="fp32",
        speed=SLOW,
        memory_bytes=memory,
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "bert"])
def test_activations_are_what_autograd_keeps(family: str, precision: torch.dtype) -> None:
    heads = {"num_heads": 4, "num_kv_heads": 4 if family in ("gpt2", "bert") else 2}
    config = model(family=family, num_layers=3, d_model=64, **heads)
    made = Transformer(config).to(precision)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.ndim:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, VOCAB, (2, SEQ_LEN))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        projected_cross_entropy(made.outputs(tokens), tokens, torch.ones(2))
    element = precision.itemsize
    block = total_bytes(block_pieces(config, 2, SEQ_LEN, element, on_gpu=False))
    edges = total_bytes(edge_pieces(config, 2, SEQ_LEN, element, on_gpu=False)) + output_gradient_bytes(config)
    assert sum(storage.nbytes() for storage in kept.values()) == config.num_layers * block + edges


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dp", [2, 3])
def test_the_states_of_all_ranks_are_three_numbers_for_each_parameter(dp: int, tied: bool) -> None:
    config = model(tie_embeddings=tied)
    for stage in (1, 2, 3):
        (memory,) = row_of(task(dp, config=config), Setting(dp, 1, stage, 2)).memory
        total = dp * (memory.parts["masters"] + memory.parts["moments"])
        assert 12 * config.num_parameters <= total < 12 * config.num_parameters + 12 * dp
    (memory,) = row_of(task(dp, config=config), Setting(dp, 1, 0, 2)).memory
    assert (memory.parts["masters"], memory.parts["moments"]) == (0, 8 * config.num_parameters)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_rank_in_fp32_keeps_no_masters_at_any_stage_that_keeps_weights_whole(stage: int) -> None:
    config = model()
    (memory,) = row_of(task(1, config=config), Setting(1, 1, stage, 2)).memory
    assert (memory.parts["masters"], memory.parts["moments"]) == (0, 8 * config.num_parameters)
    (memory,) = row_of(task(1, config=config), Setting(1, 1, 3, 2)).memory
    assert (memory.parts["masters"], memory.parts["moments"]) == (4 * config.num_parameters, 8 * config.num_parameters)


def test_stages_hold_the_model_and_a_tied_matrix_twice() -> None:
    config = model()
    shapes = stage_shapes(config, stage_bounds(config, 2))
    assert sum(one.blocks for one in shapes) == config.num_layers
    assert sum(one.parameters for one in shapes) == config.num_parameters + VOCAB * config.d_model
    first, last = row_of(task(), Setting(2, 2, 1, 2)).memory
    assert first.parts["weights"] == 4 * shapes[0].parameters
    assert last.parts["weights"] == 4 * shapes[1].parameters


def test_every_legal_row_is_there_and_no_other() -> None:
    rows = plan_rows(task(4))
    settings = {row.setting for row in rows}
    assert len(settings) == len(rows)
    assert {(one.dp, one.pp) for one in settings} == {(4, 1), (2, 2), (1, 4)}
    assert {one.zero_stage for one in settings if one.pp > 1} == {1}
    assert {one.zero_stage for one in settings if one.pp == 1} == {0, 1, 2, 3}
    assert {one.micro_batch for one in settings if one.dp == 4} == {1, 2, 4}
    assert {one.recompute for one in settings} == {False, True}
    assert {row.setting for row in plan_rows(replace(task(4), most_stages=2)) if row.setting.pp > 1} < settings
    assert max(row.setting.pp for row in plan_rows(replace(task(4), most_stages=2))) == 2
    assert not any(one.offload_optimizer or one.offload_parameters for one in settings)  # a CPU has nowhere to offload
    speeds = [row.step.tokens_per_s for row in rows]
    assert speeds == sorted(speeds, reverse=True)


def test_recomputation_and_smaller_micro_batches_take_less_memory_and_partitions_less_with_each_stage() -> None:
    wide = model(d_model=512, num_layers=8, num_heads=8)
    asked = task(4, config=wide)

    def device(setting: Setting) -> int:
        parts = row_of(asked, setting).memory[0].parts
        return sum(parts[name] for name in ("weights", "masters", "moments", "gradients", "activations"))

    settings = (Setting(1, 1, 1, 16), Setting(1, 1, 1, 16, recompute=True), Setting(1, 1, 1, 1))
    whole, again, small = (row_of(task(1), one) for one in settings)
    assert again.peak_bytes < whole.peak_bytes
    assert small.peak_bytes < whole.peak_bytes
    assert again.step.compute_s > whole.step.compute_s
    assert device(Setting(4, 1, 0, 1)) > device(Setting(4, 1, 1, 1)) > device(Setting(4, 1, 2, 1))


def test_the_bubble_and_traffic_are_those_of_the_formulas() -> None:
    row = row_of(task(4), Setting(1, 4, 1, 2))
    assert row.layout.num_micro_batches == 8
    assert row.bubble == pytest.approx(3 / 11)
    assert row.step.bubble_s / row.step.compute_s == pytest.approx(3 / 8)
    config = model()
    (shape,) = stage_shapes(config, stage_bounds(config, 1))
    layout = BatchLayout(16, 4, 1, 2)
    sent = {
        stage: traffic_bytes(config, Setting(4, 1, stage, 2), layout, shape, SEQ_LEN, 4)["data_parallel"]
        for stage in (0, 1, 3)
    }
    parameters = config.num_parameters
    assert sent[0] == pytest.approx(2 * 3 / 4 * 4 * parameters, abs=1)
    assert sent[1] == pytest.approx(3 / 4 * (8 + 4) * parameters, abs=1)
    assert sent[3] == pytest.approx(3 / 4 * layout.num_micro_batches * 12 * parameters, abs=1)


def gpus(slots: int = 4, config: TransformerConfig | None = None, **train: Any) -> PlanTask:
    return replace(
        task(slots, None, config, **train),
        device="cuda",
        precision=train.get("precision", "bf16"),
        speed=DeviceSpeed(1e15, 0.4, 1e11, is_gpu=True, source="made up"),
    )


def changed(asked: PlanTask, row: PlanRow) -> TrainConfig:
    """The section with the row's keys, as the command line would set them."""
    tree = asked.train.model_dump()
    for key, value in row.keys.items():
        *section, name = key.removeprefix("train.").split(".")
        (tree[section[0]] if section else tree)[name] = value
    return TrainConfig.model_validate(tree)


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"precision": "fp16"},
        {"compile": True},
        {"recompute": "blocks", "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}},
        {"zero": {"stage": 3, "offload_parameters": "cpu"}, "micro_batch": 3},
    ],
    ids=["plain", "fp16", "compiled", "all on", "weights offloaded"],
)
def test_every_row_is_a_run_that_the_configuration_accepts_and_its_keys_give_it(train: dict[str, Any]) -> None:
    asked = gpus(config=model(tie_embeddings=False), **train)
    rows = plan_rows(asked)
    assert wanted_setting(asked) in {row.setting for row in rows}
    for row in rows:
        accepted = changed(asked, row)
        assert wanted_setting(replace(asked, train=accepted)) == row.setting
        assert resolve_precision(accepted, "cuda") == asked.precision
    pipelines = {row.setting for row in rows if row.setting.pp > 1}
    assert not any(one.offload_optimizer or one.offload_parameters for one in pipelines)
    assert bool(pipelines) == ("precision" not in train)
    assert any(row.setting.zero_stage == 3 for row in rows) == ("compile" not in train)


def test_a_row_without_masters_names_its_precision() -> None:
    """On GPUs `auto` is fp32 without ZeRO and bf16 with it."""
    asked = replace(gpus(zero={"stage": 0}), precision="fp32")
    assert {row.keys.get("train.precision") for row in plan_rows(asked) if row.setting.zero_stage} == {"fp32"}
    assert {row.keys.get("train.precision") for row in plan_rows(asked) if not row.setting.zero_stage} == {None}


@pytest.mark.parametrize(
    ("asked", "setting"),
    [
        (task(1, 2**32, micro_batch=3), Setting(1, 1, 1, 3)),
        (task(1, micro_batch=6), Setting(1, 1, 1, 6)),
        (task(1, 2**40, global_batch=256, micro_batch=128), Setting(1, 1, 1, 128)),
        (task(2, 2**32, zero={"stage": 2, "offload_optimizer": "cpu"}), None),
        (gpus(2, zero={"stage": 3, "offload_parameters": "cpu"}), None),
    ],
    ids=["3 rows", "6 rows", "128 rows", "offload on CPUs", "weights offloaded"],
)
def test_what_the_file_asks_for_is_among_the_rows_whatever_it_is(asked: PlanTask, setting: Setting | None) -> None:
    wanted = wanted_setting(asked)
    assert setting in (None, wanted)
    rows = plan_rows(asked)
    assert [row.setting for row in rows].count(wanted) == 1
    chosen = best_row(asked, rows)
    assert chosen is not None
    assert replace(chosen.setting, micro_batch=wanted.micro_batch) == wanted


def test_auto_is_the_layouts_own_where_the_memory_is_not_known() -> None:
    unknown = task(1, global_batch=64)
    chosen = best_row(unknown, plan_rows(unknown))
    assert chosen is not None
    assert chosen.layout == BatchLayout(64, 1, 1, "auto")
    known = task(1, 2**40, global_batch=64)
    best = best_row(known, plan_rows(known))
    assert best is not None
    assert best.layout.micro_batch > 8


def test_ranks_share_a_machines_memory_less_their_libraries() -> None:
    shared = replace(task(4, parallel={"dp": 2}), shared_bytes=10 * 2**30, rank_bytes=2**30)
    limits = {row.setting.dp * row.setting.pp: row.device_limit for row in plan_rows(shared)}
    assert limits == {4: 3 * 2**29, 2: 4 * 2**30}
    assert {row.host_limit for row in plan_rows(shared)} == {None}
    beside = replace(gpus(zero={"stage": 3, "offload_optimizer": "cpu"}), shared_bytes=2**20, memory_bytes=2**34)
    wanted = row_of(beside, wanted_setting(beside))
    assert (wanted.device_limit, wanted.host_limit, wanted.limit, wanted.fits) == (2**34, 2**18, "host memory", False)


def test_auto_takes_the_fastest_micro_batch_that_fits_and_fixed_keys_stay() -> None:
    free = task(1, zero={"stage": 1})
    rows = plan_rows(free)
    roomy = best_row(free, rows)
    assert roomy is not None
    sizes = {
        row.layout.micro_batch: row.peak_bytes
        for row in rows
        if row.setting == Setting(1, 1, 1, row.layout.micro_batch)
    }
    limit = math.ceil(sizes[4] / 0.95) + 1
    tight = task(1, memory=limit, zero={"stage": 1})
    chosen = best_row(tight, plan_rows(tight))
    assert chosen is not None
    assert chosen.layout.micro_batch <= 4
    assert chosen.setting.zero_stage == 1
    assert chosen.peak_bytes <= limit
    fixed = task(1, memory=limit, zero={"stage": 1}, micro_batch=16)
    assert best_row(fixed, plan_rows(fixed)) is None
    assert row_of(fixed, wanted_setting(fixed)).limit == "memory"
    assert any(row.fits for row in plan_rows(fixed))


def test_too_few_slots_for_a_pipeline_are_named() -> None:
    with pytest.raises(ConfigError, match="not one pipeline"):
        wanted_setting(task(1, parallel={"pp": 2}))


def test_offload_moves_states_to_the_host() -> None:
    config = model()
    asked = gpus(2, config)
    plain, moved = row_of(asked, Setting(2, 1, 2, 2)), row_of(asked, Setting(2, 1, 2, 2, offload_optimizer=True))
    states = 12 * -(-config.num_parameters // 2)
    assert plain.peak_bytes - moved.peak_bytes == states
    assert moved.host_bytes - plain.host_bytes == states + states // 3
    assert any(row.setting.offload_parameters for row in plan_rows(asked))


def test_flops_count_matrices_and_scores() -> None:
    config = model(tie_embeddings=False)
    matrices = sum(
        p.numel() for name, p in Transformer(config).named_parameters() if p.ndim == 2 and "embedding" not in name
    )
    assert matrix_parameters(config) == matrices == matrix_parameters(model(tie_embeddings=True))
    assert flops_per_token(config, SEQ_LEN) == 6 * matrices + 12 * 4 * 2 * 16 * SEQ_LEN


def facts(**keys: Any) -> DataFacts:
    well = {"tokens": 10**9, "documents": 10**6, "epochs": 1.0, "labels": 0, "chats": False, "task": "causal_lm"}
    shape = {"family": "llama", "parameters": 50_000_000, "pretrained": False, "tokens_seen": 10**9}
    return DataFacts(**{**well, **shape, **keys})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokens_seen": 10**8}, "Hoffmann"),
        ({"tokens_seen": 10**11}, "larger model"),
        ({"epochs": 6.0}, "Muennighoff"),
        ({"epochs": 40.0}, "beyond 16"),
        ({"tokens": 10**6}, "few for a model from scratch"),
        ({"labels": 2}, "text_classification learns"),
        ({"chats": True}, "train.task=sft"),
        ({"task": "sft"}, "without a mask"),
        ({"task": "text_classification"}, "without classes"),
        ({"task": "text_classification", "labels": 2}, "model.family=bert"),
        ({"family": "bert"}, "does not write"),
    ],
)
def test_advice_says_what_does_not_fit_the_data(keys: dict[str, Any], said: str) -> None:
    assert said in "\n".join(advise(facts(**keys)))


def test_there_is_no_advice_where_all_is_well() -> None:
    assert advise(facts()) == []
