"""`auto` for stages, ZeRO, recomputation and offload: what is free, what is kept, and what is never chosen."""

import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from tests.unit.test_trainer_planner import SLOW, changed, gpus, model, task
from trainer.architecture import TransformerConfig
from trainer.config import AutoTrainConfig, TrainConfig
from trainer.deepspeed_config import resolve_precision
from trainer.planner.memory import Setting
from trainer.planner.rows import PlanRow, PlanTask, best_row, plan_rows, row_of, wanted_setting
from trainer.planner.speed import DeviceSpeed

ALL = {
    "parallel": {"pp": "auto"},
    "zero": {"stage": "auto", "offload_optimizer": "auto", "offload_parameters": "auto"},
    "recompute": "auto",
}
WIDE = model(d_model=512, num_layers=8, num_heads=8)


def free(asked: PlanTask, **train: Any) -> PlanTask:
    """The same, with another `train` section in which keys of the layout may be `auto`."""
    return replace(asked, train=AutoTrainConfig.model_validate({"global_batch": 16, **train}))


def known_gpus(slots: int, memory: int, host: int | None = 2**44, config: TransformerConfig = WIDE, **train: Any):
    return replace(free(gpus(slots, config), **train), memory_bytes=memory, shared_bytes=host)


def chosen(asked: PlanTask) -> PlanRow:
    found = best_row(asked, plan_rows(asked))
    assert found is not None
    return found


def allowed(asked: PlanTask) -> list[PlanRow]:
    """Rows that fit and whose keys change nothing that the file fixes, found from the rows' keys alone."""
    train = asked.train
    fixed = {
        "train.parallel.pp": train.parallel.pp,
        "train.zero.stage": train.zero.stage,
        "train.zero.offload_optimizer": train.zero.offload_optimizer,
        "train.zero.offload_parameters": train.zero.offload_parameters,
        "train.recompute": train.recompute,
        "train.precision": train.precision,
    }
    if train.parallel.dp != "auto":
        fixed["train.parallel.dp"] = train.parallel.dp
    return [
        row
        for row in plan_rows(asked)
        if row.fits
        and all(fixed[key] in ("auto", value) for key, value in row.keys.items() if key in fixed)
        and "train.precision" not in row.keys
    ]


SECTIONS: dict[str, dict[str, Any]] = {
    "all free": ALL,
    "stages alone": {"parallel": {"pp": "auto"}},
    "two pipelines": {**ALL, "parallel": {"dp": 2, "pp": "auto"}},
    "two stages": {**ALL, "parallel": {"pp": 2}},
    "ZeRO alone": {"zero": {"stage": "auto"}},
    "ZeRO 2": {**ALL, "zero": {"stage": 2}},
    "no ZeRO": {**ALL, "zero": {"stage": 0}, "precision": "fp32"},
    "offloaded weights": {**ALL, "zero": {"stage": "auto", "offload_parameters": "cpu"}},
    "recomputed": {**ALL, "recompute": "blocks"},
    "recomputation alone": {"recompute": "auto"},
    "own micro-batch": {**ALL, "micro_batch": 3},
    "fp16": {**ALL, "precision": "fp16"},
    "compiled": {**ALL, "compile": True},
}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("room", [1.0, 0.6, 0.3])
def test_the_choice_is_as_good_as_any_that_keeps_to_the_file(name: str, room: float) -> None:
    section = SECTIONS[name]
    roomy = known_gpus(4, 2**44, **section)
    precision = resolve_precision(roomy.train, "cuda")
    roomy = replace(roomy, precision=precision)
    most = row_of(roomy, wanted_setting(roomy)).peak_bytes
    asked = replace(roomy, memory_bytes=math.ceil(room * most / 0.95))
    candidates = [row for row in allowed(asked) if "micro_batch" not in section or row.layout.micro_batch == 3]
    found = best_row(asked, plan_rows(asked))
    if not candidates:
        assert found is None
        return
    assert found is not None
    assert found.setting in {row.setting for row in candidates}
    assert found.step.tokens_per_s >= 0.97 * max(row.step.tokens_per_s for row in candidates)
    accepted = changed(asked, found)  # the section that a rank is told
    assert type(accepted) is TrainConfig
    assert resolve_precision(accepted, "cuda") == precision
    assert wanted_setting(replace(asked, train=accepted)) == found.setting


def test_less_memory_takes_more_means_and_the_plainest_that_will_do() -> None:
    def means(row: PlanRow) -> int:
        one = row.setting
        return one.offload_optimizer + one.offload_parameters + one.recompute

    large = model(d_model=2048, num_layers=24, num_heads=16)
    roomy = known_gpus(64, 2**40, config=large, **{**ALL, "global_batch": 256})
    roomy = replace(roomy, seq_len=2048, speed=DeviceSpeed(1e15, 0.4, 4.5e11, is_gpu=True, source="made up"))
    plain, fastest = chosen(roomy), max(row.step.tokens_per_s for row in allowed(roomy))
    as_good = [row for row in allowed(roomy) if row.step.tokens_per_s >= 0.97 * fastest]
    assert any(means(row) > 0 and row.peak_bytes < plain.peak_bytes for row in as_good)
    assert means(plain) == 0
    needed = min(row.peak_bytes for row in allowed(roomy) if means(row) == 0)
    tight = chosen(replace(roomy, memory_bytes=needed))
    assert tight.peak_bytes < needed
    assert means(tight) > 0


def test_on_gpus_without_a_precision_the_plan_is_for_bf16_and_never_without_zero() -> None:
    train = AutoTrainConfig.model_validate(ALL)
    assert resolve_precision(train, "cuda") == "bf16"
    assert resolve_precision(train, "cpu") == "fp32"
    for slots in (1, 4):
        asked = known_gpus(slots, 2**44, **ALL)
        assert all(row.setting.zero_stage > 0 for row in allowed(asked))
        assert chosen(asked).setting.zero_stage > 0
    on_cpus = replace(free(task(2, 2**44), **ALL), speed=SLOW)
    assert any(row.setting.zero_stage == 0 for row in allowed(on_cpus))


def test_what_combines_badly_is_never_chosen() -> None:
    for section in SECTIONS.values():
        asked = known_gpus(4, 2**44, **section)
        asked = replace(asked, precision=resolve_precision(asked.train, "cuda"))
        for row in allowed(asked):
            one = row.setting
            assert one.pp == 1 or one.zero_stage == 1
            assert one.pp == 1 or not (one.offload_optimizer or one.offload_parameters)
            assert one.pp == 1 or asked.precision != "fp16"
            assert one.zero_stage == 3 or not one.offload_parameters
            assert one.zero_stage != 3 or not asked.train.compile
            assert one.zero_stage > 0 or asked.precision == "fp32"
            assert one.dp * one.pp <= 4


def test_pipelines_of_auto_fit_the_model_and_the_fewest_nodes() -> None:
    stages = {row.setting.pp for row in allowed(known_gpus(8, 2**44, config=model(), parallel={"pp": "auto"}))}
    assert stages == {1, 2, 4}  # four blocks
    few = replace(known_gpus(8, 2**44, config=model(), parallel={"pp": "auto"}), most_stages=2)
    assert {row.setting.pp for row in allowed(few)} == {1, 2}
    two = known_gpus(8, 2**44, config=model(), parallel={"dp": 2, "pp": "auto"})
    found = {(row.setting.dp, row.setting.pp) for row in allowed(two)}
    assert found == {(2, 1), (2, 2), (2, 3), (2, 4)}  # surplus slots stay free


@pytest.mark.parametrize(
    ("asked", "setting"),
    [
        (free(task(4), **ALL), Setting(4, 1, 1, 4)),
        (free(gpus(4), **ALL), Setting(4, 1, 1, 4)),
        (free(gpus(4), zero={"stage": "auto", "offload_parameters": "cpu"}), Setting(4, 1, 3, 4, False, False, True)),
        (free(gpus(4), parallel={"pp": 2}, zero={"stage": "auto"}, recompute="blocks"), Setting(2, 2, 1, 2, True)),
    ],
    ids=["CPUs", "GPUs", "weights offloaded", "two stages"],
)
def test_where_the_memory_is_not_known_auto_is_what_is_safe(asked: PlanTask, setting: Setting) -> None:
    assert wanted_setting(asked) == setting
    assert chosen(asked).setting == setting


def test_nothing_goes_to_a_host_whose_memory_is_not_known() -> None:
    roomy = known_gpus(1, 2**44, host=None, **ALL)
    needed = min(row.peak_bytes for row in plan_rows(roomy) if not row.setting.offload_optimizer)
    unknown = replace(roomy, memory_bytes=math.floor(0.9 * needed / 0.95))
    assert any(row.fits and row.setting.offload_optimizer for row in plan_rows(unknown))
    assert best_row(unknown, plan_rows(unknown)) is None
    assert chosen(replace(unknown, shared_bytes=2**44)).setting.offload_optimizer


def test_a_rank_is_told_no_auto() -> None:
    for section in ({"parallel": {"pp": "auto"}}, {"zero": {"stage": "auto"}}, {"recompute": "auto"}, ALL):
        assert AutoTrainConfig.model_validate(section).auto_layout
        with pytest.raises(ValidationError):
            TrainConfig.model_validate(section)
    assert AutoTrainConfig.model_validate(TrainConfig().model_dump()).auto_layout == {}
