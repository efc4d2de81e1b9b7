"""A checkpoint written by any mesh becomes a folder that transformers loads with equal logits."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from data_service.errors import ConfigError
from tests.helpers.written_parts import cut, make_state
from tests.unit.test_trainer_hf import VARIANTS, _model, _tokenizer_folder
from trainer.checkpoint import write_part
from trainer.errors import CheckpointCorruptError, CheckpointIncompleteError, ManifestInvalidError
from trainer.export import export_checkpoint, read_provenance
from trainer.fragments import Fragment
from trainer.manifest import commit
from trainer.model import Transformer, TransformerConfig, parameter_shapes


def _checkpoint(uri: str, module: Transformer, config: TransformerConfig, num_ranks: int, **fields: object) -> None:
    flat = {name: parameter.detach().flatten() for name, parameter in module.named_parameters()}
    shapes = parameter_shapes(config)
    receipts = [
        write_part(
            uri,
            30,
            1,
            rank,
            [
                Fragment(
                    one.name,
                    one.kind,
                    one.start,
                    one.numel,
                    flat[one.name][one.start : one.stop] if one.kind == "master" else torch.zeros(one.numel),
                )
                for one in own
            ],
        )
        for rank, own in enumerate(cut(shapes, num_ranks, seed=num_ranks))
    ]
    state = make_state(shapes, 30, dp=num_ranks, **({"model": asdict(config)} | fields))
    commit(uri, 30, 1, receipts, state)


@pytest.mark.parametrize(("variant", "num_ranks"), [("tied", 1), ("untied", 3), ("grouped", 4)])
def test_exported_checkpoint_loads_in_transformers_with_equal_logits(
    variant: str, num_ranks: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = replace(VARIANTS[variant], vocab_size=300)
    model = _model(config)
    uri, out = str(tmp_path / "checkpoints"), str(tmp_path / "export" / "step_00000030")
    _checkpoint(uri, model, config, num_ranks)
    provenance = export_checkpoint(uri, 30, out, str(_tokenizer_folder(tmp_path / "tokenizer")))
    assert provenance.step == 30
    assert read_provenance(out) == provenance

    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(out).eos_token_id == theirs.config.eos_token_id == 0


def test_the_digest_is_of_the_weights_and_not_of_the_mesh(tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    model = _model(config)
    digests = []
    for num_ranks in (1, 4):
        uri = str(tmp_path / str(num_ranks))
        _checkpoint(uri, model, config, num_ranks)
        digests.append(export_checkpoint(uri, 30, str(tmp_path / "out"), None).digest)
    with torch.no_grad():
        model.head.norm.weight[3] += 1e-6
    _checkpoint(str(tmp_path / "changed"), model, config, 1)
    digests.append(export_checkpoint(str(tmp_path / "changed"), 30, str(tmp_path / "out"), None).digest)
    assert digests[0] == digests[1] != digests[2]


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    uri, out = str(tmp_path / "checkpoints"), str(tmp_path / "out")
    with pytest.raises(CheckpointIncompleteError, match=r"no manifest\.json"):
        export_checkpoint(uri, 30, out, None)
    _checkpoint(uri, _model(config), config, 2)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        export_checkpoint(uri, 30, out, str(tmp_path))
    assert not (tmp_path / "out" / "config.json").exists()
    part = tmp_path / "checkpoints" / "step_00000030" / "attempt_1" / "rank_00001.safetensors"
    data = bytearray(part.read_bytes())
    data[1500:] = bytes(len(data) - 1500)
    part.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match="rank_00001"):
        export_checkpoint(uri, 30, str(tmp_path / "damaged"), None)
    assert not (tmp_path / "damaged" / "config.json").exists()
    assert not (tmp_path / "damaged" / "model.safetensors").exists()


@pytest.mark.parametrize("model", [{}, {"vocab_size": 3}, asdict(replace(VARIANTS["tied"], num_layers=2))])
def test_a_checkpoint_of_another_model_is_refused(model: dict[str, object], tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    _checkpoint(str(tmp_path), _model(config), config, 1, model=model)
    with pytest.raises(ManifestInvalidError):
        export_checkpoint(str(tmp_path), 30, str(tmp_path / "out"), None)


def test_garbled_provenance_is_named(tmp_path: Path) -> None:
    assert read_provenance(str(tmp_path)) is None
    (tmp_path / "stormjib.json").write_text(json.dumps({"step": 3}))
    with pytest.raises(ManifestInvalidError, match=r"stormjib\.json"):
        read_provenance(str(tmp_path))
