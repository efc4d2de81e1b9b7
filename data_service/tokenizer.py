"""Token ids: a byte-level BPE or unigram model trained on the corpus, or an existing tokenizer, as one folder of files.

The folder (`tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, and `chat_template.jinja` where there
is one) is what `transformers.AutoTokenizer` loads. Every document ends with the end token; text that spells a special
token is encoded as ordinary text, so no document can end another.

Owns training, the sample that is trained on, reading and writing that folder. Refuses a tokenizer without an end token.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_service import storage
from data_service.config import TokenizerTrainConfig
from data_service.errors import ConfigError
from data_service.unigram import train_bpe, train_unigram

__all__ = [
    "END_TOKEN",
    "TOKENIZER_FILES",
    "TokenizerFiles",
    "TrainingSample",
    "encode_documents",
    "folder_digest",
    "load_encoder",
    "read_tokenizer",
    "train_tokenizer",
    "trained_specials",
    "write_tokenizer",
]

END_TOKEN = "<|endoftext|>"
_JSON = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIALS = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (_JSON, _CONFIG, _SPECIALS, _TEMPLATE)
"""Names of all files that a tokenizer's folder may have here."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAMPLE_BITS = 20
_KNOWN_END_TOKENS = (END_TOKEN, "<|im_end|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as the bytes of its files."""

    files: tuple[tuple[str, bytes], ...]
    """(name, content), sorted by name."""
    vocab_size: int
    """Ids are below it; special tokens are counted."""
    eos_id: int
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token` and so on, as chat templates know them → their texts."""
    control_tokens: tuple[str, ...]
    """Texts of all special tokens, sorted."""
    control_ids: frozenset[int]
    """Their ids."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja template, where the tokenizer has one."""
        found = dict(self.files).get(_TEMPLATE)
        return None if found is None else found.decode()

    def with_chat_template(self, template: str) -> "TokenizerFiles":
        """The same tokenizer with another chat template."""
        files = {**dict(self.files), _TEMPLATE: template.encode()}
        return replace(self, files=tuple(sorted(files.items())))

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
    found = []
    for name in sorted(TOKENIZER_FILES):
        try:
            found.append((name, storage.read_bytes(storage.join(folder_uri, name))))
        except FileNotFoundError:
            if name != _TEMPLATE:
                return None
    return _digest(found)


class TrainingSample:
    """Which documents a tokenizer is trained on: those of the smallest hashes, as many as `max_bytes` take.

    Sizes are summed by the upper 20 bits of the hash, so the choice follows from the set of documents, whatever their
    order, and costs 8 MiB.
    """

    def __init__(self, max_bytes: int) -> None:
        """Set up; no document was seen yet."""
        self._max_bytes = max_bytes
        self._bytes = np.zeros(1 << _SAMPLE_BITS, dtype=np.int64)

    def add(self, hashes: npt.NDArray[np.uint64], sizes: npt.NDArray[np.integer]) -> None:
        """Tell of documents: the first 8 bytes of the hash of their text [n], little-endian, and their bytes [n]."""
        bins = (hashes >> np.uint64(64 - _SAMPLE_BITS)).astype(np.int64)
        np.add.at(self._bytes, bins, sizes.astype(np.int64))

    def below(self, first: int = 0) -> int:
        """The hash behind the last one to train on, 2^64 where all are taken; `first` is the least (`eval_below`)."""
        start = first >> (64 - _SAMPLE_BITS)
        if start >= self._bytes.size:
            return 1 << 64
        ends = np.cumsum(self._bytes[start:])
        # One bin at least: the first that holds anything.
        taken = max(int(np.searchsorted(ends, self._max_bytes, side="right")), int(np.argmax(ends > 0)) + 1)
        return (start + taken) << (64 - _SAMPLE_BITS)


def trained_specials(template: str | None) -> list[str]:
    """Special tokens of a tokenizer that is trained: the end token, and what its chat template writes as `<|name|>`."""
    return sorted({END_TOKEN, *re.findall(r"<\|[A-Za-z0-9_]+\|>", template or "")})


def train_tokenizer(
    config: TokenizerTrainConfig, texts: Callable[[], Iterable[str]], template: str | None = None
) -> TokenizerFiles:
    """Train a byte-level tokenizer (GPT-2's pre-tokenizer, no piece across words).

    The result depends on the texts and their order alone, not on threads or the process.

    Args:
        config: model and size.
        texts: the texts to train on, the same at each call: a unigram model reads them several times. Of a chat, the
            contents of its messages.
        template: a chat template to keep in the folder; what it writes as `<|name|>` becomes a special token.
    """
    specials = trained_specials(template)
    if config.model == "unigram":
        tokenizer = train_unigram(texts, config.vocab_size, specials)
    else:
        tokenizer = train_bpe(texts(), config.vocab_size, config.min_frequency, specials)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TOKEN,
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    named = {key: END_TOKEN for key in ("bos_token", "eos_token", "pad_token")}
    return _files(tokenizer.to_str(), settings, named, END_TOKEN, template)


def _files(
    text: str, settings: dict[str, Any], specials: dict[str, Any], end_token: str, template: str | None
) -> TokenizerFiles:
    tokenizer = Tokenizer.from_str(text)
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    contents = {
        _JSON: text.encode(),
        _CONFIG: (json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(),
        _SPECIALS: (json.dumps(specials, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(),
    }
    if template is not None:
        contents[_TEMPLATE] = template.encode()
    named = {key: _token_text(settings.get(key)) or _token_text(specials.get(key)) for key in _NAMED_TOKENS}
    control = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return TokenizerFiles(
        files=tuple(sorted(contents.items())),
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=vocabulary[end_token],
        special_tokens={key: value for key, value in named.items() if value is not None},
        control_tokens=tuple(sorted(control)),
        control_ids=frozenset(control.values()),
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
    end_tokens = [_token_text(settings.get("eos_token")), _token_text(specials.get("eos_token")), *_KNOWN_END_TOKENS]
    end_token = next((token for token in end_tokens if token is not None and token in vocabulary), None)
    if end_token is None:
        raise ConfigError(
            f"data.tokenizer.path={path}: no end token was found, neither eos_token in {_CONFIG} beside it nor one of "
            f"{', '.join(_KNOWN_END_TOKENS)}. Put a {_CONFIG} with an eos_token beside {_JSON}."
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings, "eos_token": end_token}
    settings.setdefault("pad_token", end_token)
    for key in _NAMED_TOKENS:  # transformers takes an object only with a key of its own that older releases leave out
        for named in (settings, specials):
            if isinstance(named.get(key), dict):
                named[key] = _token_text(named[key])
    template = _chat_template(folder, settings.pop("chat_template", None))
    return _files(text, settings, {**specials, "eos_token": end_token}, end_token, template)


def _chat_template(folder: str, configured: object) -> str | None:
    """The template beside a tokenizer: the file before the key, the one named `default` of several."""
    uri = storage.join(folder, _TEMPLATE)
    try:
        return storage.read_bytes(uri).decode()
    except FileNotFoundError:
        pass
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.tokenizer.path: {uri} is not UTF-8: {error}. Repair or remove it.") from error
    if isinstance(configured, list):
        named = {one.get("name"): one.get("template") for one in configured if isinstance(one, dict)}
        configured = named.get("default")
    return configured if isinstance(configured, str) else None


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
