"""Every family against `transformers`, both ways: language models, classifiers of padded rows, and what is refused."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_service.errors import ConfigError
from tests.helpers.initial_weights import initialise
from tests.helpers.peer_models import PEER_LENGTH, PEER_VOCABULARY, PEERS, make_peer, peer_tokens
from trainer.architecture import Family
from trainer.config import ModelConfig, TrainConfig
from trainer.hf import build_from_hf, open_weights, read_config, save_hf
from trainer.layers import compile_blocks
from trainer.model import Transformer, TransformerConfig, parameter_shapes

CLASSIFIERS = ["llama_tied", "qwen2_tied", "qwen3", "gpt2", "bert", "bert_untied"]
FAMILIES: list[Family] = ["llama", "qwen2", "qwen3", "gpt2", "bert"]


def _load_theirs(folder: Path, family: str, classifies: bool) -> Any:
    import transformers

    if classifies:
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def _difference(one: Tensor, two: Tensor) -> float:
    assert one.shape == two.shape
    return float((one - two).abs().max())


@pytest.mark.parametrize("name", PEERS)
def test_language_model_has_the_logits_of_transformers_both_ways(name: str, tmp_path: Path) -> None:
    theirs = make_peer(name, tmp_path / "theirs")
    ours = build_from_hf(str(tmp_path / "theirs"), "cpu", torch.float32)
    tokens = peer_tokens()
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert _difference(ours(tokens), expected) < 1e-4
        save_hf(str(tmp_path / "ours"), ours.config, ours.named_parameters(), None)
        again = _load_theirs(tmp_path / "ours", PEERS[name][0], classifies=False)
        assert _difference(again(tokens).logits, expected) < 1e-5
    assert expected.std() > 0.1
    assert read_config(str(tmp_path / "ours")) == ours.config
    assert ours.config.family == PEERS[name][0]
    assert {name: tuple(one.shape) for name, one in ours.named_parameters()} == parameter_shapes(ours.config)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_of_padded_rows_has_the_logits_of_transformers_both_ways(name: str, tmp_path: Path) -> None:
    theirs = make_peer(name, tmp_path / "theirs", num_labels=5)
    ours = build_from_hf(str(tmp_path / "theirs"), "cpu", torch.float32)
    tokens, lengths = peer_tokens(rows=4), torch.tensor([40, 7, 1, 23])
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    tokens = tokens.masked_fill(~real, 0)
    doc_ids = (~real).long()
    classes = ["very bad", "bad", "so so", "good", "very good"]
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real.long()).logits
        assert _difference(ours(tokens, None, doc_ids), expected) < 1e-4
        save_hf(str(tmp_path / "ours"), ours.config, ours.named_parameters(), None, class_names=classes)
        described = json.loads((tmp_path / "ours" / "config.json").read_text())
        (tmp_path / "ours" / "config.json").write_text(json.dumps(described | {"pad_token_id": 0}))
        again = _load_theirs(tmp_path / "ours", PEERS[name][0], classifies=True)
        assert _difference(again(tokens, attention_mask=real.long()).logits, expected) < 1e-5
        other_padding = tokens.masked_fill(~real, 9)
        assert _difference(ours(other_padding, None, doc_ids), ours(tokens, None, doc_ids)) < 1e-5
        alone = ours(tokens[1:2, :7])
        assert _difference(alone, expected[1:2]) < 1e-4
    assert [again.config.id2label[number] for number in range(5)] == classes
    assert read_config(str(tmp_path / "ours")) == ours.config


def test_sharded_folder_of_fused_matrices_loads(tmp_path: Path) -> None:
    theirs = make_peer("gpt2", tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    ours = build_from_hf(str(tmp_path / "theirs"), "cpu", torch.float32)
    with torch.no_grad():
        assert _difference(ours(peer_tokens()), theirs(peer_tokens()).logits) < 1e-4


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert"])
def test_folder_of_a_bare_model_starts_a_classifier(name: str, tmp_path: Path) -> None:
    """Its names have no prefix and there is no head: what is missing starts as in a model from scratch."""
    theirs = make_peer(name, tmp_path / "whole")
    theirs.base_model.save_pretrained(tmp_path / "bare")
    section = ModelConfig.model_validate({"from": str(tmp_path / "bare")})
    config = TransformerConfig.from_section(section, PEER_VOCABULARY, PEER_LENGTH, num_labels=4)
    ours = Transformer(config)
    initialise(ours.named_parameters(), 3, config, folder=str(tmp_path / "bare"))
    fresh = Transformer(config)
    initialise(fresh.named_parameters(), 3, config)
    head = {"head.classifier.weight", "head.classifier.bias", "head.pooler.weight", "head.pooler.bias"}
    for (name, one), two in zip(ours.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two) is (name in head), name
    tokens = peer_tokens()
    with torch.no_grad():
        hidden = theirs.base_model(tokens).last_hidden_state
        pooled = hidden[:, -1] if config.causal else torch.tanh(ours.head.pooler(hidden[:, 0]))
        assert _difference(ours(tokens), ours.head.classifier(pooled)) < 1e-4


def test_classifier_with_other_classes_starts_from_a_classifier(tmp_path: Path) -> None:
    make_peer("qwen3", tmp_path / "theirs", num_labels=5)
    section = ModelConfig.model_validate({"from": str(tmp_path / "theirs")})
    same = TransformerConfig.from_section(section, PEER_VOCABULARY, PEER_LENGTH, num_labels=5)
    other = TransformerConfig.from_section(section, PEER_VOCABULARY, PEER_LENGTH, num_labels=3)
    assert "head.classifier.weight" in open_weights(str(tmp_path / "theirs"), same)
    assert "head.classifier.weight" not in open_weights(str(tmp_path / "theirs"), other)
    with pytest.raises(ConfigError, match="classifier of 5 classes"):
        TransformerConfig.from_section(section, PEER_VOCABULARY, PEER_LENGTH)


def test_encoder_is_not_taken_for_a_language_model(tmp_path: Path) -> None:
    make_peer("bert", tmp_path)
    section = ModelConfig.model_validate({"from": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"encoder.*text_classification"):
        TransformerConfig.from_section(section, PEER_VOCABULARY, PEER_LENGTH)
    assert TransformerConfig.from_section(section, PEER_VOCABULARY, PEER_LENGTH, num_labels=2).num_labels == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_labels", [0, 3])
def test_model_from_scratch_is_what_transformers_loads(family: Family, num_labels: int, tmp_path: Path) -> None:
    section = ModelConfig(family=family, d_model=32, num_layers=2, num_heads=4, init_std=0.2)
    config = TransformerConfig.from_section(section, 101, 24, num_labels)
    ours = Transformer(config).eval()
    initialise(ours.named_parameters(), 7, config)
    assert tuple(name for name, _ in ours.named_parameters()) == tuple(parameter_shapes(config))
    save_hf(str(tmp_path), config, ours.named_parameters(), None)
    theirs = _load_theirs(tmp_path, family, num_labels > 0)
    tokens = torch.randint(101, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert _difference(ours(tokens), theirs(tokens).logits) < 1e-4
    assert read_config(str(tmp_path)) == replace(config, rope_theta=read_config(str(tmp_path)).rope_theta)


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_biases_are_zero_and_norms_one(family: Family) -> None:
    config = TransformerConfig.from_section(ModelConfig(family=family, d_model=32, num_layers=2), 101, 24)
    model = Transformer(config).requires_grad_(False)
    initialise(model.named_parameters(), 7, config)
    again = Transformer(config)
    initialise(reversed(list(again.named_parameters())), 7, config)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            residual = name.endswith((".attention.out.weight", ".feed_forward.down.weight"))
            std = 0.02 / (2 if residual and family != "bert" else 1)
            assert abs(float(parameter.std()) / std - 1) < 0.1, name


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen2_yarn"])
def test_documents_of_a_row_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    make_peer(name, tmp_path)
    model = build_from_hf(str(tmp_path), "cpu", torch.float32)
    tokens = peer_tokens(rows=2, length=24)
    doc_ids = (torch.arange(24) >= 10).long().expand(2, -1)
    positions = torch.cat((torch.arange(10), torch.arange(14))).expand(2, -1)
    both = model(tokens, positions, doc_ids)
    assert _difference(both[:, :10], model(tokens[:, :10])) < 1e-4
    assert _difference(both[:, 10:], model(tokens[:, 10:])) < 1e-4


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert"])
def test_recomputed_blocks_give_the_same_gradients_and_keep_less(name: str, tmp_path: Path) -> None:
    make_peer(name, tmp_path)
    config = read_config(str(tmp_path))
    tokens, losses, gradients, kept = peer_tokens(), [], [], []
    for recompute in (False, True):
        model = Transformer(config, recompute=recompute)
        initialise(model.named_parameters(), 3, config, folder=str(tmp_path))
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens).logsumexp(dim=-1).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(sum(sizes))
    assert losses[0] == losses[1]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_compiled_blocks_compute_the_same(name: str, tmp_path: Path) -> None:
    """Compiling takes most of a minute on a CPU; one graph a block, also within documents."""
    make_peer(name, tmp_path)
    config = read_config(str(tmp_path))
    model = Transformer(config)
    initialise(model.named_parameters(), 3, config, folder=str(tmp_path))
    tokens = peer_tokens(rows=2, length=32)
    doc_ids = (torch.arange(32) >= 11).long().expand(2, -1)
    found: list[list[Tensor]] = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model)
        loss = model(tokens, None, doc_ids).logsumexp(dim=-1).mean()
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)
    assert list(dict(model.named_parameters())) == list(parameter_shapes(config))


def test_compiling_is_refused_where_it_cannot_help() -> None:
    for changes in ({"device": "cpu"}, {"zero": {"stage": 3}}):
        with pytest.raises(ValueError, match="compile=true"):
            TrainConfig.model_validate({"compile": True, **changes})


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("llama_tied", {"model_type": "mamba"}, "mamba"),
        ("llama_tied", {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "longrope"),
        ("llama_tied", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama_tied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama_tied", {"hidden_act": "mish"}, "mish"),
        ("llama_tied", {"hidden_size": "wide"}, "wide"),
        ("llama_tied", {"num_attention_heads": 0}, "num_heads 0"),
        ("llama_tied", {"num_attention_heads": 0, "head_dim": None}, "ZeroDivisionError"),
        ("llama_tied", {"num_key_value_heads": 3}, "share 3 keys"),
        ("llama_tied", {"intermediate_size": math.inf}, "OverflowError"),
        ("llama_tied", {"rms_norm_eps": math.inf}, "norm_eps inf"),
        ("llama_tied", {"head_dim": 7}, "head_dim 7"),
        ("llama_tied", {"head_dim": -8}, "head_dim -8"),
        ("llama_tied", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor 0"),
        ("llama_tied", {"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "factor nan"),
        ("llama_tied", {"rope_scaling": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta 0"),
        ("gpt2", {"n_head": 0}, "ZeroDivisionError"),
        ("bert", {"num_hidden_layers": 0}, "num_layers 0"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": None}, "use_sliding_window"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
    ],
)
def test_unsupported_folders_are_refused(name: str, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    make_peer(name, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=named):
        read_config(str(tmp_path))


def test_manifest_fields_make_the_same_configuration(tmp_path: Path) -> None:
    make_peer("llama_yarn_tuned", tmp_path)
    config = read_config(str(tmp_path))
    assert TransformerConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert hash(config) == hash(read_config(str(tmp_path)))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"family": "gpt2", "num_kv_heads": 2}, "num_kv_heads"),
        ({"family": "bert", "head_dim": 16}, "head_dim"),
        ({"family": "mamba"}, "family"),
    ],
)
def test_families_that_share_no_heads_say_so(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelConfig.model_validate({"d_model": 64, "num_heads": 8, **given})
