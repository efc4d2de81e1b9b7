"""Encoding: one work item per chunk, from texts to tokens of both splits.

    read/NNNNN/chunk-NNNNNN.arrow ─ duplicates out, tokenizer ─▶ encode/NNNNN/NNNNNN.arrow

What comes out depends on the chunk, the duplicates, the tokenizer and the split alone, not on where or when it is done.

Owns what is in the work folder under `encode/`. Rows and shards are made of it by `shard_writer`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_service import storage
from data_service.chat import load_renderer
from data_service.chunks import Chunk, Texts, read_texts
from data_service.counts import SplitCounts, length_counts
from data_service.dedupe import kept_of
from data_service.manifest import SPLITS
from data_service.tokenizer import encode_documents, load_encoder
from data_service.work_items import Result, WorkFiles, arrays_of, arrays_to_bytes, do_once

__all__ = ["EncodeItem", "EncodeSettings", "EncodedChunk", "EncodedDocuments", "encode_chunk", "read_encoded"]

_BATCH_BYTES = 128 << 10
"""Text that is encoded in one call; the tokenizer's own results take about 100 bytes a token."""


@dataclass(frozen=True)
class EncodeSettings:
    """What is the same for all chunks."""

    work_uri: str
    tokenizer_uri: str
    tokenizer_digest: str
    eos_id: int
    token_dtype: Literal["uint16", "uint32"]
    eval_below: int
    row_tokens: int
    """Tokens of a row, which a chat is cut to."""


@dataclass(frozen=True)
class EncodeItem:
    """One chunk to encode."""

    settings: EncodeSettings
    chunk: Chunk
    has_duplicates: bool
    """Whether the chunk's run loses documents."""
    is_chat: bool
    label_numbers: tuple[int, ...] | None
    """Class number of each of the file's labels; None where the dataset has no classes."""


@dataclass(frozen=True)
class EncodedChunk:
    """What came of a chunk."""

    chunk: Chunk
    counts: dict[str, SplitCounts]
    """Split → counts."""
    labels: dict[str, dict[int, int]]
    """Split → class number → documents; NO_LABEL left out."""
    num_unanswered: int
    """Chats that were left out, since their row would hold no label that counts."""


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of one chunk in one split, d of them with S tokens in all."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[S], each document ended by the end token."""
    lengths: npt.NDArray[np.uint32]
    """[d]"""
    answers: npt.NDArray[np.bool_] | None
    """[S]: the token counts as a label; None for plain text, where all do."""
    labels: npt.NDArray[np.int32] | None
    """[d]: class numbers; None where the dataset has no classes."""


def _path(chunk: Chunk) -> str:
    return f"encode/{chunk.file:05d}/{chunk.number:06d}"


def encode_chunk(item: EncodeItem) -> EncodedChunk:
    """Encode one chunk into the work folder."""
    result = do_once(item.settings.work_uri, _path(item.chunk), lambda files: _encode(item, files))
    counts: dict[str, SplitCounts] = {}
    for split in SPLITS:
        documents, tokens, num_bytes, lengths = result["counts"][split]
        counts[split] = SplitCounts(documents, tokens, num_bytes, dict(lengths))
    classes: dict[str, dict[int, int]] = {split: dict(result["labels"][split]) for split in SPLITS}
    return EncodedChunk(item.chunk, counts, classes, result["unanswered"])


def _encode(item: EncodeItem, files: WorkFiles) -> Result:
    settings = item.settings
    keep = kept_of(settings.work_uri, item.chunk) if item.has_duplicates else None
    texts = read_texts(settings.work_uri, item.chunk, keep)
    parts = [_tokens(item, texts.texts[first:last]) for first, last in _batches(texts.num_bytes)]
    tokens = np.concatenate([np.zeros(0, settings.token_dtype), *(part.tokens for part in parts)])
    lengths = np.concatenate([np.zeros(0, np.uint32), *(part.lengths for part in parts)])
    answers = np.concatenate([part.answers for part in parts if part.answers is not None] or [np.zeros(0, np.bool_)])
    labels = None if item.label_numbers is None else _labels(item.label_numbers, texts)
    answered = np.ones(lengths.size, np.bool_)
    if item.is_chat:
        answered = _answered(answers, lengths, settings.row_tokens)
    held_out = texts.high < np.uint64(settings.eval_below)
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    counts: dict[str, list[object]] = {}
    classes: dict[str, list[tuple[int, int]]] = {}
    for split, chosen in (("train", ~held_out & answered), ("eval", held_out & answered)):
        of_tokens = np.repeat(chosen, lengths)
        arrays[f"{split}_tokens"] = tokens[of_tokens]
        arrays[f"{split}_lengths"] = lengths[chosen]
        if item.is_chat:
            arrays[f"{split}_answers"] = np.packbits(answers[of_tokens], bitorder="little")
        classes[split] = []
        if labels is not None:
            arrays[f"{split}_labels"] = labels[chosen]
            found, numbers = np.unique(labels[chosen], return_counts=True)
            pairs = zip(found.tolist(), numbers.tolist(), strict=True)
            classes[split] = [(number, count) for number, count in pairs if number >= 0]
        histogram = sorted(length_counts(lengths[chosen]).items())
        num_bytes = int(texts.num_bytes[chosen].sum())
        counts[split] = [int(chosen.sum()), int(of_tokens.sum()), num_bytes, histogram]
    files.write(f"{_path(item.chunk)}.arrow", arrays_to_bytes(arrays))
    return {"counts": counts, "labels": classes, "unanswered": int((~answered).sum())}


def _answered(
    answers: npt.NDArray[np.bool_], lengths: npt.NDArray[np.uint32], row_tokens: int
) -> npt.NDArray[np.bool_]:
    """Which chats [d] have a token that counts, behind their first, among those that fit a row."""
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    before = np.concatenate([[0], np.cumsum(answers, dtype=np.int64)])
    first = np.minimum(1, lengths)
    found: npt.NDArray[np.bool_] = before[begins + np.minimum(lengths, row_tokens)] > before[begins + first]
    return found


def _batches(num_bytes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about _BATCH_BYTES each."""
    ends = np.cumsum(num_bytes)
    first = 0
    while first < ends.size:
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _BATCH_BYTES, side="right")))
        yield first, last
        first = last


def _tokens(item: EncodeItem, texts: Sequence[str]) -> EncodedDocuments:
    settings = item.settings
    if item.is_chat:
        chats = load_renderer(settings.tokenizer_uri, settings.tokenizer_digest).encode_chats(texts)
        return EncodedDocuments(chats.tokens, chats.lengths, chats.answers, None)
    tokenizer = load_encoder(settings.tokenizer_uri, settings.tokenizer_digest)
    tokens, lengths = encode_documents(tokenizer, texts, settings.eos_id, np.dtype(settings.token_dtype))
    return EncodedDocuments(tokens, lengths, None, None)


def _labels(numbers: tuple[int, ...], texts: Texts) -> npt.NDArray[np.int32]:
    if texts.labels is None:
        return np.full(len(texts.texts), -1, dtype=np.int32)
    # The last entry answers for -1, a document without a label.
    return np.array([*numbers, -1], dtype=np.int32)[texts.labels]


def read_encoded(work_uri: str, chunk: Chunk, split: str) -> EncodedDocuments:
    """The documents of a chunk in a split."""
    wanted = [f"{split}_{name}" for name in ("tokens", "lengths", "answers", "labels")]
    arrays = arrays_of(storage.join(work_uri, f"{_path(chunk)}.arrow"), wanted)
    tokens = arrays[f"{split}_tokens"]
    bits = arrays.get(f"{split}_answers")
    answers = None if bits is None else np.unpackbits(bits, count=tokens.size, bitorder="little").view(np.bool_)
    return EncodedDocuments(tokens, arrays[f"{split}_lengths"], answers, arrays.get(f"{split}_labels"))
