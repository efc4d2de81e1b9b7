"""Adapters on meshes: trained like by a plain loop, alone in the checkpoint, merged and given to `peft`."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from data_service.client import DataClient
from data_service.errors import ConfigError
from tests.helpers.ranks import RanksFailedError
from tests.helpers.tiny_model import make_model_folder
from tests.ranks.conftest import GLOBAL_BATCH, Case, Lab, copy_step
from trainer import manifest
from trainer.adapters import Lora, base_of, trained_shapes
from trainer.config import LoraConfig, ModelConfig
from trainer.export import export_checkpoint
from trainer.fragment_readers import StateView, fill_initial
from trainer.hf import build_from_hf, read_config
from trainer.lora import attach
from trainer.model import Transformer, TransformerConfig
from trainer.optim import group_parameters, lr_at, make_optimizer, set_lr
from trainer.protocol import WorkerSpec

STEPS = 6
LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "down"))
CASES = [Case(1, 1), Case(2, 1, zero=2), Case(2, 1, zero=3), Case(1, 2)]
MORE_CASES = [Case(1, 1, zero=0), Case(2, 2), Case(3, 1), Case(2, 1, precision="bf16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model_folder(tmp_path_factory.mktemp("base"), init_std=0.08)


def adapter_spec(lab: Lab, case: Case, checkpoints: Path, folder: str, resume_step: int | None = None) -> WorkerSpec:
    spec = lab.changed(
        case,
        checkpoints,
        resume_step,
        lora=LORA,
        steps=STEPS,
        optimizer={"lr": 2e-2, "grad_clip": 1.0},
        checkpoint={"every": 3},
    )
    return replace(spec, model=ModelConfig.model_validate({"from": folder}), base=base_of(folder))


def plain_losses(spec: WorkerSpec, folder: str) -> tuple[list[float], Transformer]:
    """Losses of a plain loop over the adapters, and the model after it."""
    config = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)
    lora = Lora.of(spec.train.lora, config)
    assert lora is not None
    model = Transformer(config)
    attach(model, lora)
    views = [StateView(n, 0, p.numel(), {"master": p.detach().view(-1)}, (0, 0)) for n, p in model.named_parameters()]
    fill_initial(views, spec.seed, config, folder, lora)
    optimizer = make_optimizer(group_parameters(model.named_parameters(), spec.train.optimizer), spec.train.optimizer)
    losses = []
    with contextlib.closing(DataClient(spec.data)) as client:
        for rows in client.stream("train", 0, STEPS, (0, GLOBAL_BATCH)):
            tokens = torch.from_numpy(rows.tokens.astype("int64"))
            counted = torch.from_numpy(rows.loss_mask.copy())
            loss = F.cross_entropy(model(tokens[:, :-1])[counted], tokens[:, 1:][counted])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                [one for one in model.parameters() if one.requires_grad], spec.train.optimizer.grad_clip
            )
            set_lr(optimizer, lr_at(rows.index, spec.train))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, model.requires_grad_(False)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in MORE_CASES)], ids=str
)
def test_adapters_are_trained_alike_on_every_mesh(lab: Lab, case: Case, folder: str, tmp_path: Path) -> None:
    spec = adapter_spec(lab, case, tmp_path, folder)
    expected, _ = plain_losses(spec, folder)
    outcome = lab.run(spec)
    tolerance = 2e-3 if case.precision == "fp32" else 3e-2
    assert [outcome.steps[step].loss for step in range(1, STEPS + 1)] == pytest.approx(expected, rel=tolerance)
    assert expected[-1] < expected[0] - 0.01, "adapters learn"
    state = manifest.read_manifest(spec.checkpoints_uri, STEPS).state
    config = read_config(folder)
    assert state.parameters == trained_shapes(config, state.lora)
    assert all(".lora_" in name for name in state.parameters)
    assert len(state.parameters) == 2 * 3 * config.num_layers
    assert state.base is not None
    assert state.base.folder == folder


def test_a_mesh_goes_on_where_another_stopped(lab: Lab, folder: str, tmp_path: Path) -> None:
    first = lab.run(adapter_spec(lab, Case(1, 2), tmp_path / "pipeline", folder))
    copy_step(tmp_path / "pipeline", tmp_path / "partitioned", 3)
    spec = adapter_spec(lab, Case(2, 1, zero=3), tmp_path / "partitioned", folder, resume_step=3)
    second = lab.run(spec)
    for step in range(4, STEPS + 1):
        assert second.steps[step].loss == pytest.approx(first.steps[step].loss, rel=2e-3)


def test_a_base_that_changed_is_refused(lab: Lab, folder: str, tmp_path: Path) -> None:
    lab.run(adapter_spec(lab, Case(1, 1), tmp_path / "one", folder))
    other = make_model_folder(tmp_path / "other", init_std=0.08, seed=8)
    with pytest.raises(RanksFailedError, match="adapters fit no other weights"):
        lab.run(adapter_spec(lab, Case(1, 1), tmp_path / "one", other, resume_step=3))


def test_adapters_are_merged_and_given_to_peft(lab: Lab, folder: str, tmp_path: Path) -> None:
    """The merged folder, the folder with adapters under peft, and the model with adapters agree."""
    import peft
    import transformers

    spec = adapter_spec(lab, Case(1, 2), tmp_path / "checkpoints", folder)
    _, plain = plain_losses(spec, folder)
    lab.run(spec)
    export_checkpoint(spec.checkpoints_uri, STEPS, str(tmp_path / "export"), f"{folder}")
    tokens = torch.randint(0, spec.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        before = base(tokens).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "export" / "adapter")).eval()(tokens).logits
        ours = build_from_hf(str(tmp_path / "export"), "cpu", torch.float32)(tokens)
    assert float((merged - before).abs().max()) > 0.05
    assert adapted.numpy() == pytest.approx(merged.numpy(), abs=1e-4)
    assert ours.numpy() == pytest.approx(merged.numpy(), abs=1e-4)
    assert plain(tokens).numpy() == pytest.approx(merged.numpy(), abs=5e-3)
    told = json.loads((tmp_path / "export" / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (4, 8.0, folder)


def test_an_export_without_its_base_says_so(lab: Lab, tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", init_std=0.08)
    spec = adapter_spec(lab, Case(1, 1), tmp_path / "checkpoints", base)
    lab.run(spec)
    config = Path(base) / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ConfigError, match="Restore the folder"):
        export_checkpoint(spec.checkpoints_uri, STEPS, str(tmp_path / "export"), base)
