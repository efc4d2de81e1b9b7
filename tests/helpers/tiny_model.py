"""A small Hugging Face folder with random weights and a real byte-level tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from trainer.architecture import Family
from trainer.config import ModelConfig
from trainer.hf import save_hf
from trainer.initialise import initial_tensor
from trainer.model import TransformerConfig, parameter_shapes

END = "<|endoftext|>"
CORPUS = [
    "这是一个很好的故事，我很喜欢这个故事。",
    "这是一个不好的东西，质量太差了，不推荐。",
    "The wind fell and the sail came down slowly.",
    "She reads a long story about the sea, and then sleeps.",
    "Ça va très bien — naïve café, über 3,14 €.",
    "emoji 🙂🙃 and numbers 12345 67890",
]


def train_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """Byte-level BPE over a few lines in several scripts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def make_model_folder(
    folder: Path,
    *,
    d_model: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int | None = 2,
    max_positions: int = 256,
    init_std: float = 0.25,
    seed: int = 7,
    vocab_size: int = 400,
    family: Family = "llama",
    num_labels: int = 0,
) -> str:
    """Write a model whose greedy text is varied (wide initial weights and biases); returns the folder's path."""
    tokenizer = train_tokenizer(vocab_size)
    files = folder / "tokenizer-source"
    files.mkdir(parents=True)
    tokenizer.save(str(files / "tokenizer.json"))
    (files / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END})
    )
    section = ModelConfig(
        family=family,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        init_std=init_std,
    )
    vocab_size = max(vocab_size, tokenizer.get_vocab_size())
    config = TransformerConfig.from_section(section, vocab_size, max_positions, num_labels)
    save_hf(str(folder / "model"), config, _tensors(config, seed, init_std), str(files))
    return str(folder / "model")


def _tensors(config: TransformerConfig, seed: int, spread: float) -> Iterator[tuple[str, Tensor]]:
    for name, shape in parameter_shapes(config).items():
        values = initial_tensor(name, shape, seed, config)
        if name.endswith(".bias"):  # zeros would hide a bias that is left out
            values += spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        yield name, values
