import pytest

from trainer.config import ModelConfig, TrainConfig
from trainer.model import TransformerConfig
from trainer.planner import plan_run

VOCAB, SEQ_LEN = 500, 32


def model(**shape: int | bool) -> TransformerConfig:
    section = ModelConfig.model_validate({"d_model": 32, "num_layers": 4, "num_heads": 2, **shape})
    return TransformerConfig.from_section(section, VOCAB, SEQ_LEN)


def train(dp: int | str, pp: int, zero: int = 1, global_batch: int = 8) -> TrainConfig:
    return TrainConfig.model_validate(
        {"parallel": {"dp": dp, "pp": pp}, "zero": {"stage": zero}, "global_batch": global_batch}
    )


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_the_states_of_all_ranks_are_three_numbers_for_each_parameter(dp: int, tie: bool) -> None:
    config = model(tie_embeddings=tie)
    plan = plan_run(train(dp, 1), config, seq_len=SEQ_LEN, slots=dp, precision="fp32")
    assert plan.parameters == config.num_parameters
    total = sum(stage.optimizer_bytes for stage in plan.stages) * dp
    assert 12 * config.num_parameters <= total < 12 * config.num_parameters + 4 * dp


def test_stages_hold_the_model_and_a_tied_matrix_twice() -> None:
    config = model()
    plan = plan_run(train(2, 2), config, seq_len=SEQ_LEN, slots=4, precision="bf16")
    assert sum(stage.blocks for stage in plan.stages) == config.num_layers
    assert sum(stage.parameters for stage in plan.stages) == config.num_parameters + VOCAB * config.d_model
    assert all(stage.weight_bytes == 2 * stage.parameters for stage in plan.stages)


def test_the_batch_is_what_ranks_will_run() -> None:
    plan = plan_run(train(3, 1), model(), seq_len=SEQ_LEN, slots=3, precision="fp32")
    assert plan.tokens_per_step == 8 * SEQ_LEN
    assert plan.masked_rows == 3 * plan.micro_batch * plan.num_micro_batches - 8
    assert plan.bubble == 0
    piped = plan_run(train("auto", 2), model(), seq_len=SEQ_LEN, slots=5, precision="fp32")
    assert (piped.dp, piped.pp) == (2, 2)
    assert piped.bubble == pytest.approx(1 / (piped.num_micro_batches + 1))


def test_without_zero_nothing_is_partitioned() -> None:
    config = model()
    plan = plan_run(train(2, 1, zero=0), config, seq_len=SEQ_LEN, slots=2, precision="fp32")
    assert plan.stages[0].optimizer_bytes == 8 * config.num_parameters
