"""The rank protocol survives JSON."""

import json
import math
import traceback

import pytest

from data_service.access import DataAccess
from data_service.errors import ConfigError
from data_service.plan import OrderSpec
from trainer.config import ModelConfig, TrainConfig
from trainer.manifest import EvalRecord, PartReceipt, StoredRange, TrainState
from trainer.protocol import (
    EvalReport,
    FinishedReport,
    PartReport,
    ReadyReport,
    Report,
    Sample,
    StepReport,
    WorkerSpec,
    report_from_json,
    report_to_json,
)

ORDER = OrderSpec(
    1, 32, 8, 2, True, 2.0, ((0, (("zh", 3.0), ("en", 1.0))), (50, (("zh", 0.0), ("en", 1.0)))), ((5, 9),)
)
SPEC = WorkerSpec(
    attempt=3,
    rank=1,
    world_size=4,
    dp=2,
    pp=2,
    local_rank=1,
    device="cpu",
    master_addr="127.0.0.1",
    master_port=29500,
    seed=2**63 - 1,
    seq_len=32,
    vocab_size=300,
    model=ModelConfig.model_validate({"from": "/models/tiny"}),
    train=TrainConfig.model_validate({"parallel": {"dp": "auto", "pp": 2}, "micro_batch": 2}),
    data=DataAccess(("127.0.0.1:1", "127.0.0.1:2"), "Zk3vQ8wnT5", ORDER, "5e1f", 4, 0.3, 3.0, 60.0),
    checkpoints_uri="s3://bucket/run/checkpoints",
    resume_step=None,
)
RECEIPT = PartReceipt(
    10, 3, 1, "attempt_3/rank_00001.safetensors", 64, (StoredRange("head.norm.weight", "exp_avg", 4, 8, 32, (7,)),)
)
STATE = TrainState(
    step=10,
    optimizer_steps=10,
    plan_digest="p",
    consumed_batches=10,
    dataset_digest="d",
    seed=1,
    seq_len=32,
    global_batch=8,
    dp=2,
    pp=2,
    zero_stage=1,
    precision="fp32",
    model={"d_model": 32, "tie_embeddings": True, "norm_eps": 1e-5},
    parameters={"head.norm.weight": (32,)},
    config={"run": {"name": "r", "tags": [1, None]}},
    versions={"torch": "2"},
    evaluation=EvalRecord(1.5, math.exp(1.5), 100),
)
REPORTS: list[Report] = [
    ReadyReport(1, {"import": 3.5}),
    ReadyReport(0, {}, "NVIDIA H100 80GB HBM3", "bf16", 6e9),
    StepReport(1, 0, 5.5, 256, "0123456789abcdef", 1e-3, 0.5, 0.1, 0.01, 2**31),
    EvalReport(0, 6.0, 403.4, 1000),
    EvalReport(0, 0.6, None, 1000, {"accuracy": 0.5}, metric="accuracy", better="higher"),
    EvalReport(0, 6.0, 403.4, 1000, {"f1": 0.5}, (Sample((1, 2), (3,)), Sample((4,), ()))),
    PartReport(10, 1, RECEIPT, STATE, 0.5),
    PartReport(10, 2, RECEIPT, None),
    FinishedReport(1, 20, "stop"),
]


def test_a_specification_survives_json() -> None:
    again = WorkerSpec.from_json(SPEC.to_json())
    assert again == SPEC
    assert again.model.from_ == "/models/tiny"
    assert "\n" not in SPEC.to_json()


def test_a_rank_is_told_no_more_of_the_configuration_than_it_needs() -> None:
    """The `data` section names paths that no rank may know; a new field needs a thought about what it gives away."""
    assert set(json.loads(SPEC.to_json())) == {
        *("attempt", "rank", "world_size", "dp", "pp", "local_rank", "device", "master_addr", "master_port"),
        *("seed", "seq_len", "vocab_size", "model", "train", "data", "checkpoints_uri", "resume_step"),
        *("facts", "threads", "interface", "samples", "base"),
    }
    assert set(json.loads(SPEC.to_json())["data"]) == {
        *("control", "token", "order", "dataset_digest", "run_ahead", "hedge_s", "read_stall_s", "stalled_s")
    }


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_report_survives_json(report: Report) -> None:
    text = report_to_json(report)
    assert "\n" not in text
    assert report_from_json(text) == report


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "step"}', '{"kind": "nonsense"}', '{"kind": "ready", "rank": "x"}']
)
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="malformed report"):
        report_from_json(text)


def test_what_is_no_specification_is_refused() -> None:
    fields = json.loads(SPEC.to_json())
    del fields["dp"]
    with pytest.raises(ConfigError, match="malformed specification"):
        WorkerSpec.from_json(json.dumps(fields))
    fields = json.loads(SPEC.to_json())
    fields["train"]["zero"]["stage"] = "auto"  # what a file may say and a rank does not take
    with pytest.raises(ConfigError, match=r"malformed specification: train\.zero\.stage"):
        WorkerSpec.from_json(json.dumps(fields))


@pytest.mark.parametrize("damage", ["a field less", "text for an object", "a bound", "cut short"])
def test_a_malformed_specification_does_not_give_the_token_away(damage: str) -> None:
    fields = json.loads(SPEC.to_json())
    if damage == "a field less":
        del fields["data"]["control"]
    elif damage == "text for an object":
        fields["data"] = json.dumps(fields["data"])
    elif damage == "a bound":
        fields["data"]["run_ahead"] = 0
    text = json.dumps(fields)
    with pytest.raises(ConfigError, match="malformed specification: [a-zA-Z.]+") as caught:
        WorkerSpec.from_json(text[: text.index(SPEC.data.token) + 8] if damage == "cut short" else text)
    told = "".join(traceback.format_exception(caught.value))
    assert SPEC.data.token not in told
    assert SPEC.data.token[:6] not in told


def test_the_place_of_a_mistake_is_named() -> None:
    fields = json.loads(SPEC.to_json())
    fields["data"]["read_stall_s"] = "soon"
    with pytest.raises(ConfigError, match=r"specification: data\.read_stall_s: Input should be a valid number"):
        WorkerSpec.from_json(json.dumps(fields))
