"""Tiny random models of `transformers`, one for each way a family differs, to compare ours with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PEERS", "PEER_LENGTH", "PEER_VOCABULARY", "make_peer", "peer_tokens"]

PEER_VOCABULARY = 211
PEER_LENGTH = 64
_WIDTH = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": PEER_LENGTH,
}
_GROUPED = {**_WIDTH, "num_key_value_heads": 2}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama_biases": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama_gelu": ("llama", {**_WIDTH, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "llama_linear": (
        "llama",
        {**_GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "llama_dynamic": (
        "llama",
        {**_GROUPED, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}},
    ),
    "llama_llama3": (
        "llama",
        {
            **_GROUPED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama_yarn": ("llama", {**_GROUPED, "head_dim": 32, "rope_parameters": _YARN}),
    "llama_yarn_tuned": (
        "llama",
        {
            **_GROUPED,
            "head_dim": 32,
            "rope_parameters": {
                **_YARN,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "truncate": False,
            },
        },
    ),
    "qwen2_tied": ("qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2_yarn": ("qwen2", {**_GROUPED, "rope_parameters": {**_YARN, "attention_factor": 1.3}}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 32}),
    "qwen3_biases": ("qwen3", {**_GROUPED, "head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": PEER_LENGTH}),
    "gpt2_untied": (
        "gpt2",
        {
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 3,
            "n_inner": 100,
            "n_positions": PEER_LENGTH,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
    ),
    "bert": ("bert", _WIDTH),
    "bert_untied": ("bert", {**_WIDTH, "hidden_act": "gelu_new", "type_vocab_size": 3, "tie_word_embeddings": False}),
}
"""Name → (family, what its `transformers` configuration is given)."""


def make_peer(name: str, folder: Path, num_labels: int = 0, **saved: Any) -> nn.Module:
    """Build a model with wide random weights, biases and norms, and save it.

    Args:
        name: in `PEERS`.
        folder: to save it in.
        num_labels: 0 for the language model (of an encoder the masked one), else a classifier of that many classes.
        saved: further arguments of `save_pretrained`.

    Returns:
        The model in evaluation mode.
    """
    import transformers

    family, given = PEERS[name]
    labels = {"num_labels": num_labels} if num_labels else {}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=PEER_VOCABULARY, pad_token_id=0, bos_token_id=None, eos_token_id=None, **given, **labels
    )
    if num_labels:
        auto = transformers.AutoModelForSequenceClassification
    else:
        auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    model: nn.Module = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and own.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.2 * noise)
    model.save_pretrained(folder, **saved)
    return model


def peer_tokens(rows: int = 3, length: int = 40) -> Tensor:
    """Token ids [rows, length], none of them 0."""
    return torch.randint(1, PEER_VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
