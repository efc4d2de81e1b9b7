"""Folders of a Llama, out and in, and those that are damaged; families are compared in `test_trainer_families`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_service.errors import ConfigError
from tests.helpers.initial_weights import initialise
from trainer.config import ModelConfig
from trainer.hf import build_from_hf, load_hf, read_config, save_hf
from trainer.model import Transformer, TransformerConfig, parameter_shapes

SHAPE = TransformerConfig(
    vocab_size=211,
    d_model=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    d_ff=80,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    init_std=0.3,
    max_positions=64,
)
VARIANTS = {
    "tied": SHAPE,
    "untied": replace(SHAPE, tie_embeddings=False),
    "grouped": replace(SHAPE, num_kv_heads=2),
    "one_kv_head_wide": replace(SHAPE, num_kv_heads=1, head_dim=32, tie_embeddings=False),
    "theta": replace(SHAPE, rope_theta=500000.0, norm_eps=1e-6),
}


def _tokens(config: TransformerConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))


def _model(config: TransformerConfig) -> Transformer:
    model = Transformer(config)
    initialise(model.named_parameters(), 3, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def _tokenizer_folder(folder: Path) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["a sail in a gale", "这是一个"],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_exported_folder_loads_in_transformers_with_equal_logits(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = replace(VARIANTS[variant], vocab_size=300)
    model = _model(config)
    tokenizer = _tokenizer_folder(tmp_path / "tokenizer")
    save_hf(str(tmp_path / "out"), config, model.named_parameters(), str(tokenizer))

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = _tokens(config)
    with torch.no_grad():
        difference = (theirs(tokens).logits - model(tokens)).abs().max()
    assert theirs.dtype == torch.float32
    assert difference < 1e-4
    assert theirs.config.eos_token_id == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.decode(loaded("这是一个 gale")["input_ids"]) == "这是一个 gale"
    assert loaded.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_folder_of_transformers_loads_here_with_equal_logits(variant: str, shard: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = VARIANTS[variant]
    torch.manual_seed(5)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=0.3,
            max_position_embeddings=config.max_positions,
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)

    assert read_config(str(tmp_path / "theirs")) == config
    ours = build_from_hf(str(tmp_path / "theirs"), "cpu", torch.float32)
    tokens = _tokens(config)
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4


def test_round_trip_keeps_every_byte(tmp_path: Path) -> None:
    config = VARIANTS["grouped"]
    model = _model(config)
    save_hf(str(tmp_path / "out"), config, model.named_parameters(), None)
    found_config, weights = load_hf(str(tmp_path / "out"))
    assert found_config == config
    assert dict.fromkeys(weights) == dict.fromkeys(parameter_shapes(config))
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter)


def test_bf16_export_is_the_rounded_weights(tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    model = _model(config)
    save_hf(str(tmp_path / "out"), config, model.named_parameters(), None, dtype="BF16")
    _, weights = load_hf(str(tmp_path / "out"))
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter.to(torch.bfloat16))


def test_initialise_from_a_folder(tmp_path: Path) -> None:
    config = VARIANTS["untied"]
    model = _model(config)
    save_hf(str(tmp_path / "out"), config, model.named_parameters(), None)
    section = ModelConfig.model_validate({"from": str(tmp_path / "out")})
    resolved = TransformerConfig.from_section(section, config.vocab_size, seq_len=32)
    assert resolved == config
    other = Transformer(resolved)
    initialise(other.named_parameters(), 9, resolved, folder=str(tmp_path / "out"))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ConfigError, match="data.seq_len=65"):
        TransformerConfig.from_section(section, config.vocab_size, seq_len=65)
    with pytest.raises(ConfigError, match="tokenizer"):
        TransformerConfig.from_section(section, config.vocab_size + 1, seq_len=32)


def test_folder_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_hf(str(tmp_path))
    save_hf(str(tmp_path / "out"), config, _model(config).named_parameters(), None)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled"):
        load_hf(str(tmp_path / "out"))


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    save_hf(str(tmp_path / "out"), config, _model(config).named_parameters(), None)
    file = tmp_path / "out" / "config.json"
    good = json.loads(file.read_text())
    for change, named in (
        ({"num_hidden_layers": 4}, "layers.3"),
        ({"num_hidden_layers": 2}, "no place"),
        ({"attention_bias": True}, "q_proj.bias"),
        ({"intermediate_size": 96}, "gate_proj"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match=named):
            load_hf(str(tmp_path / "out"))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": "../elsewhere.safetensors"}}'])
def test_garbled_weight_index_is_refused(text: str, tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    save_hf(str(tmp_path / "out"), config, _model(config).named_parameters(), None)
    (tmp_path / "out" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match="index"):
        load_hf(str(tmp_path / "out"))


def test_garbled_weight_file_is_refused(tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    save_hf(str(tmp_path / "out"), config, _model(config).named_parameters(), None)
    file = tmp_path / "out" / "model.safetensors"
    good = file.read_bytes()
    for data in (b"", b"\xff" * 16, (5).to_bytes(8, "little") + b"hello", good.replace(b"[211,48]", b"[212,48]")):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"model\.safetensors"):
            load_hf(str(tmp_path / "out"))
    file.write_bytes(good[:-4])
    with pytest.raises(ConfigError, match=r"model\.safetensors ends inside of"):
        build_from_hf(str(tmp_path / "out"), "cpu", torch.float32)


def test_a_file_that_the_index_names_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = VARIANTS["tied"]
    save_hf(str(tmp_path / "out"), config, _model(config).named_parameters(), None)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors is not there.*Fetch the folder again"):
        load_hf(str(tmp_path / "out"))
