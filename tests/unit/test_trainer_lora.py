"""Adapters of every family: what they compute, how they begin, and that `peft` computes the same from their folder."""

from pathlib import Path

import pytest
import torch

from data_service.errors import ConfigError
from tests.helpers.peer_models import PEER_LENGTH, PEER_VOCABULARY, PEERS, make_peer, peer_tokens
from trainer.adapters import Base, Lora, trained_shapes
from trainer.config import LoraConfig, ModelConfig
from trainer.fragment_readers import StateView, fill_initial
from trainer.lora import attach, merged
from trainer.model import Transformer, TransformerConfig
from trainer.peft_folder import save_adapters

CASES = [
    ("llama_tied", 0, "all"),
    ("llama_biases", 0, ("q", "down")),
    ("qwen3", 3, ("v", "out", "gate")),
    ("gpt2", 0, "all"),
    ("gpt2_untied", 0, ("q", "v")),
    ("gpt2", 3, ("k", "up")),
    ("bert", 3, "all"),
    ("bert", 3, ("out", "down")),
]


def adapted(name: str, num_labels: int, targets: object, folder: Path) -> tuple[Transformer, TransformerConfig, Lora]:
    """A model of ours with adapters, on the weights in a folder."""
    section = ModelConfig.model_validate({"from": str(folder)})
    config = TransformerConfig.from_section(section, PEER_VOCABULARY, PEER_LENGTH, num_labels)
    lora = Lora.of(LoraConfig.model_validate({"rank": 3, "alpha": 5.0, "targets": targets}), config)
    assert lora is not None
    model = Transformer(config)
    attach(model, lora)
    views = [StateView(n, 0, p.numel(), {"master": p.detach().view(-1)}, (0, 0)) for n, p in model.named_parameters()]
    fill_initial(views, 7, config, str(folder), lora)
    return model, config, lora


@pytest.mark.parametrize(("name", "num_labels", "targets"), CASES)
def test_peft_computes_the_same_from_our_folder(name: str, num_labels: int, targets: object, tmp_path: Path) -> None:
    import peft
    import transformers

    theirs = make_peer(name, tmp_path / "base", num_labels)
    model, config, lora = adapted(name, num_labels, targets, tmp_path / "base")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n: tuple(p.shape) for n, p in trained.items()} == trained_shapes(config, lora)
    tokens = peer_tokens(rows=1)
    with torch.no_grad():
        before = theirs(tokens).logits
        assert float((model(tokens) - before).abs().max()) < 1e-4, "adapters begin by changing nothing"
        generator = torch.Generator().manual_seed(2)
        for one in trained.values():
            one.add_(0.2 * torch.randn(one.shape, generator=generator))
        expected = model(tokens)
        assert float((expected - before).abs().max()) > 0.05
        save_adapters(str(tmp_path / "adapter"), config, lora, Base(str(tmp_path / "base"), "0"), trained)
        auto = {
            (True, "bert"): transformers.AutoModelForSequenceClassification,
            (False, "bert"): transformers.AutoModelForMaskedLM,
        }.get((num_labels > 0, PEERS[name][0]))
        auto = auto or (
            transformers.AutoModelForSequenceClassification if num_labels else transformers.AutoModelForCausalLM
        )
        labels = {"num_labels": num_labels} if num_labels else {}
        base = auto.from_pretrained(tmp_path / "base", **labels)
        found = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        assert float((found(input_ids=tokens).logits - expected).abs().max()) < 1e-3


def test_merged_weights_compute_what_adapters_do(tmp_path: Path) -> None:
    make_peer("qwen2_tied", tmp_path / "base")
    model, _, lora = adapted("qwen2_tied", 0, "all", tmp_path / "base")
    plain = Transformer(model.config)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith(".lora_b"):
                one.copy_(0.3 * torch.randn(one.shape, generator=torch.Generator().manual_seed(len(name))))
        held = dict(model.named_parameters())
        for name, one in plain.named_parameters():
            matrix = name.removesuffix(".weight")
            if f"{matrix}.lora_a" in held:
                one.copy_(merged(held[name], held[f"{matrix}.lora_a"], held[f"{matrix}.lora_b"], lora))
            else:
                one.copy_(held[name])
        tokens = peer_tokens()
        assert float((plain(tokens) - model(tokens)).abs().max()) < 1e-3


def test_only_what_is_trained_gets_a_gradient(tmp_path: Path) -> None:
    make_peer("llama_tied", tmp_path / "base")
    model, config, lora = adapted("llama_tied", 2, ("q",), tmp_path / "base")
    model(peer_tokens()).square().sum().backward()
    with_gradient = {name for name, one in model.named_parameters() if one.grad is not None}
    assert with_gradient == trained_shapes(config, lora).keys()
    assert "head.classifier.weight" in with_gradient


def test_a_target_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    make_peer("gpt2", tmp_path / "base")
    with pytest.raises(ConfigError, match="names gate: blocks of a gpt2 model have q, k, v, out, up, down"):
        adapted("gpt2", 0, ("q", "gate"), tmp_path / "base")
