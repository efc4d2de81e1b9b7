"""A small Hugging Face folder with random weights and a real byte-level tokenizer."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
    num_kv_heads: int = 2,
    max_positions: int = 256,
    init_std: float = 0.25,
    seed: int = 7,
    vocab_size: int = 400,
) -> str:
    """Write a model whose greedy text is varied (wide initial weights); returns the folder's path."""
    tokenizer = train_tokenizer(vocab_size)
    files = folder / "tokenizer-source"
    files.mkdir(parents=True)
    tokenizer.save(str(files / "tokenizer.json"))
    (files / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END})
    )
    section = ModelConfig(
        d_model=d_model, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads, init_std=init_std
    )
    config = TransformerConfig.from_section(section, max(vocab_size, tokenizer.get_vocab_size()), max_positions)
    tensors = ((name, initial_tensor(name, shape, seed, config)) for name, shape in parameter_shapes(config).items())
    save_hf(str(folder / "model"), config, tensors, str(files))
    return str(folder / "model")
