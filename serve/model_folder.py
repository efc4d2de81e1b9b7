"""What of a Hugging Face folder is needed around the weights: tokenizer, end tokens, context length.

Owns reading it from any URI. Imports no torch, so that the ingress stays small; the weights are `serve.weights`' duty.
"""

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from data_service import storage
from data_service.errors import ConfigError
from trainer.hf_config import parse

__all__ = ["ModelFolder", "read_model_folder"]


@dataclass(frozen=True)
class ModelFolder:
    """The served model, without its weights."""

    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    """Tokens that end a completion."""
    start_id: int | None
    """Stands for an empty prompt: the beginning of a new document."""
    max_positions: int
    """Tokens of prompt and completion together, at most."""
    vocab_size: int
    """Rows of the output matrix; token ids are below."""
    longest_token: int
    """Characters of the longest piece in the vocabulary: a text has at least length / longest_token tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens as the tokenizer's own post-processor adds them."""
        ids: list[int] = self.tokenizer.encode(text).ids
        if not ids and self.start_id is not None:
            ids = [self.start_id]
        return ids


def read_model_folder(model_uri: str) -> ModelFolder:
    """Read tokenizer and settings.

    Raises:
        ConfigError: a file is missing or does not parse, or the model generates no text.
    """
    config = _read_json(model_uri, "config.json", required=True)
    generation = _read_json(model_uri, "generation_config.json", required=False)
    try:
        tokenizer = Tokenizer.from_str(_read(model_uri, "tokenizer.json").decode())
    except ValueError as cause:
        raise ConfigError(f"{model_uri}/tokenizer.json does not parse ({cause}). Export the model again.") from cause
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos_ids = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
    start_ids = _ids(generation.get("bos_token_id", config.get("bos_token_id"))) or eos_ids
    shape = parse(storage.join(model_uri, "config.json"), config)
    if shape.num_labels or not shape.causal:
        kind = f"a classifier of {shape.num_labels} classes" if shape.num_labels else "an encoder"
        raise ConfigError(f"{model_uri} holds {kind}: it writes no text. Serve a folder of a causal language model.")
    return ModelFolder(
        tokenizer,
        frozenset(eos_ids),
        start_ids[0] if start_ids else None,
        shape.max_positions,
        shape.vocab_size,
        max((len(piece) for piece in tokenizer.get_vocab()), default=1),
    )


def _read(model_uri: str, name: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(model_uri, name))
    except (FileNotFoundError, NotADirectoryError) as cause:
        raise ConfigError(
            f"the model {model_uri} has no {name}. Give a Hugging Face folder, such as RUN/export/step_NNNNNNNN."
        ) from cause


def _read_json(model_uri: str, name: str, required: bool) -> dict[str, Any]:
    if not required and not storage.exists(storage.join(model_uri, name)):
        return {}
    try:
        document = json.loads(_read(model_uri, name))
    except ValueError as cause:
        raise ConfigError(f"{model_uri}/{name} is not JSON ({cause}). Export the model again.") from cause
    if not isinstance(document, dict):
        raise ConfigError(f"{model_uri}/{name} is not a JSON object. Export the model again.")
    return document


def _ids(value: object) -> list[int]:
    """Token ids of a field that holds none, one or a list."""
    if isinstance(value, int):
        return [value]
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []
