"""Token ids: a byte-level BPE trained on the corpus, or an existing tokenizer, both as one folder of files.

The folder (`tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`) is what `transformers.AutoTokenizer`
loads. Every document ends with the end token; text that spells a special token is encoded as ordinary text, so no
document can end another.

Owns training, reading and writing that folder. Refuses a tokenizer without an end token.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_service import storage
from data_service.config import TokenizerTrainConfig
from data_service.errors import ConfigError

__all__ = [
    "END_TOKEN",
    "TokenizerFiles",
    "encode_documents",
    "folder_digest",
    "load_encoder",
    "read_tokenizer",
    "train_tokenizer",
    "write_tokenizer",
]

END_TOKEN = "<|endoftext|>"
_JSON = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIALS = "special_tokens_map.json"
_FILES = (_JSON, _CONFIG, _SPECIALS)
_KNOWN_END_TOKENS = (END_TOKEN, "<|im_end|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as the bytes of its files."""

    files: tuple[tuple[str, bytes], ...]
    """(name, content), sorted by name."""
    vocab_size: int
    """Ids are below it; special tokens are counted."""
    eos_id: int

    @property
    def digest(self) -> str:
        """BLAKE2b-128 over names and contents."""
        return _digest(self.files)

    @property
    def token_dtype(self) -> np.dtype[np.unsignedinteger]:
        """uint16 where every id fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


def _digest(files: Sequence[tuple[str, bytes]]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, content in files:
        state.update(f"{name}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


def folder_digest(folder_uri: str) -> str | None:
    """`TokenizerFiles.digest` of what lies in a folder; None when a file of it is gone."""
    try:
        return _digest([(name, storage.read_bytes(storage.join(folder_uri, name))) for name in sorted(_FILES)])
    except FileNotFoundError:
        return None


def train_tokenizer(config: TokenizerTrainConfig, texts: Iterator[str]) -> TokenizerFiles:
    """Train a byte-level BPE (GPT-2's pre-tokenizer, no merges across words) on `texts`.

    The result depends on the texts and their order alone, not on threads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TOKEN,
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    specials = {key: END_TOKEN for key in ("bos_token", "eos_token", "pad_token")}
    return _files(tokenizer.to_str(), settings, specials, END_TOKEN)


def _files(text: str, settings: dict[str, Any], specials: dict[str, Any], end_token: str) -> TokenizerFiles:
    tokenizer = Tokenizer.from_str(text)
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    contents = {
        _JSON: text.encode(),
        _CONFIG: (json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(),
        _SPECIALS: (json.dumps(specials, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(),
    }
    return TokenizerFiles(
        files=tuple(sorted(contents.items())),
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=vocabulary[end_token],
    )


def _token_text(value: object) -> str | None:
    """The text of a special token, which configurations write as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_tokenizer(path: str) -> TokenizerFiles:
    """Read an existing `tokenizer.json`, or a folder that holds one.

    Raises:
        ConfigError: when it is missing, is not a tokenizer, or has no end token.
    """
    folder = path if not path.endswith(".json") else path.rpartition("/")[0] or "."
    source = path if path.endswith(".json") else storage.join(path, _JSON)
    try:
        text = storage.read_bytes(source).decode()
        tokenizer = Tokenizer.from_str(text)
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.tokenizer.path={path}: {source} does not exist. Name a tokenizer.json or a folder with one, or "
            "remove the key to train a tokenizer."
        ) from error
    except Exception as error:  # the Rust library raises plain Exception for a file that it cannot parse
        raise ConfigError(f"data.tokenizer.path={path}: {source} is not a Hugging Face tokenizer: {error}.") from error
    settings = _optional_object(storage.join(folder, _CONFIG))
    specials = _optional_object(storage.join(folder, _SPECIALS))
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    named = [_token_text(settings.get("eos_token")), _token_text(specials.get("eos_token")), *_KNOWN_END_TOKENS]
    end_token = next((token for token in named if token is not None and token in vocabulary), None)
    if end_token is None:
        raise ConfigError(
            f"data.tokenizer.path={path}: no end token was found, neither eos_token in {_CONFIG} beside it nor one of "
            f"{', '.join(_KNOWN_END_TOKENS)}. Put a {_CONFIG} with an eos_token beside {_JSON}."
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings, "eos_token": end_token}
    settings.setdefault("pad_token", end_token)
    return _files(text, settings, {**specials, "eos_token": end_token}, end_token)


def _optional_object(uri: str) -> dict[str, Any]:
    """A JSON object beside the tokenizer; empty when there is no such file."""
    try:
        value = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"data.tokenizer.path: {uri} is not JSON: {error}. Repair or remove it.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"data.tokenizer.path: {uri} is not a JSON object. Repair or remove it.")
    return value


def write_tokenizer(folder_uri: str, tokenizer: TokenizerFiles) -> None:
    """Publish the files of a tokenizer."""
    for name, content in tokenizer.files:
        storage.write_bytes(storage.join(folder_uri, name), content)


@lru_cache(maxsize=2)
def load_encoder(folder_uri: str, digest: str) -> Tokenizer:
    """The tokenizer of a folder, ready to encode documents. `digest` only keeps a changed folder from being reused."""
    tokenizer = Tokenizer.from_str(storage.read_bytes(storage.join(folder_uri, _JSON)).decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], eos_id: int, dtype: np.dtype[np.unsignedinteger]
) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.uint32]]:
    """Encode documents, each ended by the end token.

    Returns:
        The concatenated tokens [sum of lengths] of `dtype`, and the lengths uint32 [number of texts].
    """
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    lengths = np.array([len(encoding) + 1 for encoding in encodings], dtype=np.uint32)
    tokens = np.empty(int(lengths.sum()), dtype=dtype)
    place = 0
    for encoding in encodings:
        count = len(encoding)
        tokens[place : place + count] = encoding.ids
        tokens[place + count] = eos_id
        place += count + 1
    return tokens, lengths
