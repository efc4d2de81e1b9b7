"""The model's names, its layers, its attention contexts and its initial weights."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.helpers.initial_weights import initialise
from trainer.attention import CausalContext, DocumentContext
from trainer.config import ModelConfig
from trainer.initialise import initial_tensor
from trainer.model import (
    Block,
    Embedding,
    Head,
    Transformer,
    TransformerConfig,
    canonical_names,
    default_positions,
    layers,
    named_parameters,
    parameter_shapes,
)

SECTION = ModelConfig(d_model=32, num_layers=4, num_heads=4, num_kv_heads=2)
CONFIG = TransformerConfig.from_section(SECTION, vocab_size=101, seq_len=24)
GOLDEN = ["0.00164983", "-0.00880510", "-0.01374646", "0.00355875"]
CONFIGS = [CONFIG, replace(CONFIG, tie_embeddings=False)]


def _filled(config: TransformerConfig) -> Transformer:
    model = Transformer(config)
    initialise(model.named_parameters(), 7, config)
    return model.eval()


def _tokens(config: TransformerConfig, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (rows, config.max_positions), generator=generator)


def test_section_defaults_are_resolved() -> None:
    config = TransformerConfig.from_section(ModelConfig(d_model=256, num_heads=8), vocab_size=8000, seq_len=128)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (8, 32, 128)
    assert config.d_ff == 704  # 8/3 · 256 = 682.7, rounded up to a multiple of 32
    assert config.num_parameters == sum(parameter.numel() for parameter in Transformer(config).parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_names_and_shapes_are_those_of_the_module(config: TransformerConfig) -> None:
    found = {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
    assert found == parameter_shapes(config)
    assert tuple(found) == canonical_names(config)
    assert ("head.weight" in found) is not config.tie_embeddings


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
def test_layers_cut_into_stages_have_the_names_of_the_plain_model(config: TransformerConfig, num_stages: int) -> None:
    specs = layers(config)
    assert len(specs) == config.num_layers + 2
    bounds = [len(specs) * stage // num_stages for stage in range(num_stages + 1)]
    names: list[str] = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        for spec in specs[first:last]:
            module: nn.Module
            if spec.kind == "block":
                module = Block(config, spec.index)
            elif spec.kind == "embedding":
                module = Embedding(config)
            else:
                module = Head(config)
            names.extend(name for name, _ in named_parameters(module, spec, config))
    assert sorted(names) == sorted(canonical_names(config))


def test_a_tied_copy_in_the_last_stage_has_the_name_of_the_embedding() -> None:
    head = layers(CONFIG)[-1]
    assert [name for name, _ in named_parameters(Embedding(CONFIG), head, CONFIG)] == ["embedding.weight"]


@pytest.mark.parametrize("config", CONFIGS)
def test_layers_one_by_one_compute_what_the_whole_model_does(config: TransformerConfig) -> None:
    model = _filled(config)
    tokens = _tokens(config)
    hidden = model.embedding(tokens, default_positions(tokens))
    for block in model.blocks:
        hidden = block(hidden, default_positions(tokens), CausalContext())
    projection = model.head(hidden, model.embedding.weight if config.tie_embeddings else None)
    assert torch.equal(projection.logits(), model(tokens))


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    model = _filled(replace(CONFIG, init_std=0.3))
    tokens = _tokens(CONFIG)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :15], after[:, :15], atol=1e-5)
    assert not torch.allclose(before[:, 15:], after[:, 15:], atol=1e-2)


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = _filled(replace(CONFIG, init_std=0.3))
    tokens = _tokens(CONFIG, rows=2)
    doc_ids = (torch.arange(CONFIG.max_positions) >= 10).long().expand(2, -1)
    positions = default_positions(tokens).clone()
    positions[:, 10:] -= 10
    both = model(tokens, positions, doc_ids)
    assert torch.allclose(both[:, :10], model(tokens[:, :10]), atol=1e-5)
    assert torch.allclose(both[:, 10:], model(tokens[:, 10:]), atol=1e-5)
    one_document = model(tokens, context=DocumentContext(torch.zeros_like(tokens)))
    assert torch.allclose(one_document, model(tokens), atol=1e-5)


def test_only_distances_between_positions_matter() -> None:
    config = replace(CONFIG, init_std=0.3, max_positions=64)
    model = _filled(config)
    tokens = _tokens(CONFIG)
    shifted = model(tokens, default_positions(tokens) + 17)
    assert torch.allclose(shifted, model(tokens), atol=1e-4)


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    whole = dict(_filled(CONFIG).named_parameters())
    for spec in reversed(layers(CONFIG)):  # another order, one layer at a time
        if spec.kind == "block":
            module = Block(CONFIG, spec.index)
            initialise(named_parameters(module, spec, CONFIG), 7, CONFIG)
            for name, parameter in named_parameters(module, spec, CONFIG):
                assert torch.equal(parameter, whole[name])
    torch.manual_seed(1234)
    name = "blocks.1.attention.q.weight"
    shape = parameter_shapes(CONFIG)[name]
    assert torch.equal(initial_tensor(name, shape, 7, CONFIG), whole[name])
    assert not torch.equal(initial_tensor(name, shape, 8, CONFIG), whole[name])
    assert not torch.equal(initial_tensor("blocks.2.attention.q.weight", shape, 7, CONFIG), whole[name])


def test_initial_weights_never_change_between_releases() -> None:
    found = initial_tensor("embedding.weight", (2, 2), 0, CONFIG)
    assert found.dtype == torch.float32
    assert [f"{value:.8f}" for value in found.flatten().tolist()] == GOLDEN


def test_initial_scale() -> None:
    config = replace(CONFIG, d_model=256, d_ff=512, num_layers=8)
    shapes = parameter_shapes(config)
    for name, std in (
        ("embedding.weight", 0.02),
        ("blocks.0.feed_forward.up.weight", 0.02),
        ("blocks.0.feed_forward.down.weight", 0.005),
        ("blocks.7.attention.out.weight", 0.005),
    ):
        found = initial_tensor(name, shapes[name], 0, config)
        assert abs(float(found.std()) / std - 1) < 0.03
        assert abs(float(found.mean())) < std / 20
    assert torch.equal(initial_tensor("head.norm.weight", (256,), 0, config), torch.ones(256))


def test_importing_the_model_loads_no_engine() -> None:
    code = (
        "import sys, trainer.model, trainer.hf, trainer.checkpoint, trainer.export, trainer.optim\n"
        "assert not {'deepspeed', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_the_manifest_loads_no_torch() -> None:
    code = (
        "import sys, trainer.manifest, trainer.fragments, trainer.topology, trainer.errors, trainer.baseline\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_model_first_used_for_inference_can_be_trained() -> None:
    config = replace(CONFIG, rope_theta=12345.0)  # a rotary table that no other test has made
    model = _filled(config)
    with torch.inference_mode():
        model(_tokens(config))
    model(_tokens(config)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bf16_stays_near_fp32() -> None:
    config = replace(CONFIG, init_std=0.1)
    exact = _filled(config)
    rounded = Transformer(config).to(torch.bfloat16)
    initialise(rounded.named_parameters(), 7, config)
    tokens = _tokens(config)
    with torch.no_grad():
        difference = (exact(tokens) - rounded(tokens).float()).abs().max() / exact(tokens).abs().max()
    assert difference < 0.03
