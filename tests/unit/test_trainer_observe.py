"""Figures and where they go: TensorBoard files that its own reader reads, services that may fail, MFU."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_service.errors import ConfigError
from trainer.metrics import METRICS, RunFacts, evaluation_figures, step_figures
from trainer.observe.config import MlflowConfig, ObserveConfig, WandbConfig
from trainer.observe.peaks import known_peak, mfu, peak_flops
from trainer.observe.recorder import Recorder, open_recorder
from trainer.observe.services import check_services
from trainer.observe.tensorboard import TensorBoardWriter
from trainer.protocol import EvalReport, StepReport

FACTS = RunFacts(num_ranks=2, row_tokens=1000, flops_per_token=6e9, peak_flops=1e14)


def step(number: int, loss: float | None = 2.0) -> StepReport:
    return StepReport(number, number - 1, loss, 900, "0" * 16, 1e-3, 0.5, 0.5, 0.1, 2**30)


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_figures_are_declared_and_follow_from_the_report() -> None:
    figures = step_figures(step(3), FACTS)
    assert set(figures) <= set(METRICS)
    assert figures["train/tokens_per_s"] == 1800
    assert figures["train/tokens_per_s_per_gpu"] == 900
    assert figures["train/mfu_pct"] == pytest.approx(100 * 2000 * 6e9 / 2e14)
    assert figures["memory/peak_gib"] == 1.0
    assert "train/loss" not in step_figures(step(3, None), FACTS)
    assert "train/mfu_pct" not in step_figures(step(3), RunFacts(2, 1000, 6e9, None))
    told = evaluation_figures(EvalReport(3, 1.0, 2.7, 10, {"f1": 0.5}))
    assert told == {"eval/loss": 1.0, "eval/perplexity": 2.7, "eval/tokens": 10.0, "eval/f1": 0.5}
    told = evaluation_figures(EvalReport(3, 1.0, None, 10, {"f1": 0.5}))
    assert told == {"eval/loss": 1.0, "eval/rows": 10.0, "eval/f1": 0.5}


def test_known_devices_have_a_peak_and_others_none() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16", None) == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16", None) == 756.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32", None) == 19.5e12
    assert peak_flops("", "fp32", None) is None
    assert peak_flops("", "fp32", 0.1) == 1e11
    found = known_peak("NVIDIA L40S")
    assert found is not None
    assert found.source
    assert mfu(1e5, 6e9, 1, 989.4e12) == pytest.approx(0.6064, abs=1e-4)


def test_tensorboard_reads_what_is_written_and_forgets_what_is_computed_again(tmp_path: Path) -> None:
    first = TensorBoardWriter(str(tmp_path))
    for number in (1, 2, 3):
        first.scalars(number, {"train/loss": float(number)})
    first.text(2, "eval/samples", "**once** upon")
    first.close()
    again = TensorBoardWriter(str(tmp_path))
    again.forget_after(1)
    again.scalars(2, {"train/loss": 20.0})
    again.close()
    found = read(tmp_path)
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]


def test_texts_are_there(tmp_path: Path) -> None:
    writer = TensorBoardWriter(str(tmp_path))
    writer.text(2, "eval/samples", "**once** upon")
    writer.close()
    (one,) = read(tmp_path).Tensors("eval/samples/text_summary")
    assert one.step == 2
    assert one.tensor_proto.string_val == [b"**once** upon"]


class Failing:
    """A sink whose service is gone."""

    def __init__(self) -> None:
        self.calls = 0

    def scalars(self, *_: Any) -> None:
        self.calls += 1
        raise OSError("no route to host")

    text = scalars

    def close(self) -> None:
        raise AssertionError("it was left out")


def test_a_service_that_fails_is_said_once_and_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    failing = Failing()
    recorder = Recorder(
        {"observe.wandb": failing, "observe.tensorboard": TensorBoardWriter(str(tmp_path))}, said.append
    )
    for number in (1, 2):
        recorder.step(step(number), FACTS)
    recorder.evaluation(EvalReport(2, 1.0, 2.7, 10), [("once", " upon")])
    recorder.close()
    assert failing.calls == 1
    assert said == ["observe.wandb: OSError: no route to host; the run goes on without it"]
    assert len(read(tmp_path).Scalars("train/loss")) == 2
    assert len(read(tmp_path).Scalars("eval/loss")) == 1


@pytest.mark.parametrize(("name", "keys"), [("wandb", {}), ("mlflow", {"tracking_uri": "sqlite:///x.db"})])
def test_a_library_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, keys: dict[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = ObserveConfig.model_validate({name: keys, "tensorboard": False})
    with pytest.raises(ConfigError, match=rf"pip install 'stormjib\[{name}\]'"):
        check_services(config.wandb, config.mlflow)
    said: list[str] = []
    open_recorder(config, str(tmp_path), "run", {}, said.append).close()
    assert len(said) == 1


def test_wandb_without_a_key_is_refused_before_a_run_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        check_services(WandbConfig(), None)
    check_services(WandbConfig(mode="offline"), None)


def test_mlflow_takes_figures_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than the skinny package
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    config = ObserveConfig(tensorboard=False, mlflow=MlflowConfig(tracking_uri=(tmp_path / "mlruns").as_uri()))
    for number in (1, 2):
        recorder = open_recorder(config, str(tmp_path / "run"), "run", {"train": {"steps": 3}}, pytest.fail)
        recorder.step(step(number), FACTS)
        recorder.close()
    client = mlflow.tracking.MlflowClient(tracking_uri=config.mlflow.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("stormjib").experiment_id])
    assert run.data.params["train.steps"] == "3"
    assert [one.step for one in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]


def test_wandb_offline_writes_a_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    config = ObserveConfig(tensorboard=False, wandb=WandbConfig(mode="offline"))
    recorder = open_recorder(config, str(tmp_path), "run", {"train": {"steps": 3}}, pytest.fail)
    recorder.step(step(1), FACTS)
    recorder.evaluation(EvalReport(1, 1.0, 2.7, 10), [("once", " upon")])
    recorder.close()
    assert list(tmp_path.rglob("*.wandb"))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty text"):
        ObserveConfig.model_validate({"samples": {"prompts": ["once", " "]}})
