"""From sources to a prepared dataset: read, deduplicate, split, train or read the tokenizer, encode, write shards.

    sources ─ readers ─▶ spool of chunks (Arrow, ~1 MiB of text) ─ mapper ─▶ tokens ─▶ shards, index, manifest.json
                 └─ rejects.jsonl         └─ training part ─▶ tokenizer/

Reading, deduplication and writing are serial and in order; encoding a chunk is a pure function of the chunk, so a
mapper may run it anywhere and the bytes of the dataset do not depend on how many did. Memory holds one digest per
document and a few chunks. The manifest is published last and never replaced.

Owns the order of these steps and the identity of a dataset (its prepare key). Refuses to overwrite another dataset.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_service import storage
from data_service.config import DataConfig
from data_service.errors import ConfigError, SourceError
from data_service.readers import Reject, SourceFile, find_files, fingerprint, read_records
from data_service.shards import (
    DATASET_VERSION,
    INDEX_FILE,
    SPLITS,
    DatasetManifest,
    Shard,
    ShardEntry,
    SourceInfo,
    SplitInfo,
    checksum,
    encode_shard,
    index_bytes,
    manifest_uri,
    read_manifest,
    shard_file,
    tokenizer_uri,
)
from data_service.tokenizer import (
    TokenizerFiles,
    encode_documents,
    load_encoder,
    read_tokenizer,
    train_tokenizer,
    write_tokenizer,
)

__all__ = ["Mapper", "PrepareProgress", "prepare", "serial"]

_LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_HASH_RANGE = 2**64

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Mapper(Protocol):
    """Applies a function to items, possibly elsewhere and several at once, and yields the results in order."""

    def __call__(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        """Yield `function(item)` for each item, in order. Function, items and results can be pickled."""


def serial(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
    """The mapper that does everything here, one after the other."""
    return map(function, items)


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is."""

    stage: Literal["read", "tokenizer", "encode"]
    done: int
    """Source files read, or chunks encoded."""
    total: int
    num_records: int
    num_rejects: int


@dataclass(frozen=True)
class _Chunk:
    """Documents to encode: one spool file."""

    uri: str
    tokenizer_uri: str
    tokenizer_digest: str
    eos_id: int
    token_dtype: Literal["uint16", "uint32"]
    eval_below: int


@dataclass(frozen=True)
class _Encoded:
    """A chunk's documents of each split as (tokens, lengths)."""

    splits: dict[str, tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.uint32]]]


@dataclass(frozen=True)
class _Spool:
    """What reading left behind."""

    chunks: list[str]
    sources: tuple[SourceInfo, ...]
    num_records: int
    num_duplicates: int
    reject_reasons: dict[str, int]
    eval_below: int
    """A document whose hash is below this is held out."""

    @property
    def num_rejects(self) -> int:
        return sum(self.reject_reasons.values())


def prepare(
    config: DataConfig,
    dataset_uri: str,
    *,
    mapper: Mapper = serial,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> DatasetManifest:
    """Prepare a dataset, or find it prepared.

    Args:
        config: the `data` section, its paths resolved.
        dataset_uri: the folder of the dataset; it must be reachable where the mapper runs its items.
        mapper: runs the encoding of chunks.
        progress: called as the work goes on.

    Returns:
        The manifest, of this preparation or of an earlier one with the same key.

    Raises:
        ConfigError: when `dataset_uri` holds a dataset made of something else, naming what differs.
        SourceError: when a source cannot be used or too many records were rejected.
    """
    files = find_files(config.sources)
    tokenizer = None if config.tokenizer.path is None else read_tokenizer(config.tokenizer.path)
    inputs = _inputs(config, files, tokenizer)
    key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()
    if storage.exists(manifest_uri(dataset_uri)):
        return _reuse(dataset_uri, key, inputs, config)
    report = progress or (lambda _: None)
    work_uri = storage.join(dataset_uri, f"work-{key[:8]}")
    try:
        spool = _read_sources(config, files, inputs, dataset_uri, work_uri, report)
        tokenizer = tokenizer or _train(config, spool, report)
        write_tokenizer(tokenizer_uri(dataset_uri), tokenizer)
        entries, splits = _write_shards(config, dataset_uri, spool, tokenizer, mapper, report)
    finally:
        storage.remove_tree(work_uri)
    index = index_bytes(entries)
    storage.write_bytes(storage.join(dataset_uri, INDEX_FILE), index)
    token_dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.token_dtype.itemsize == 2 else "uint32"
    content = hashlib.blake2b(f"{DATASET_VERSION}/{token_dtype}/{tokenizer.digest}".encode(), digest_size=16)
    for entry in entries:
        content.update(f"/{entry.split}/{entry.number}/{entry.num_tokens}/".encode() + entry.checksum)
    manifest = DatasetManifest(
        version=DATASET_VERSION,
        digest=content.hexdigest(),
        vocab_size=tokenizer.vocab_size,
        token_dtype=token_dtype,
        eos_id=tokenizer.eos_id,
        splits=splits,
        tokenizer_digest=tokenizer.digest,
        index_digest=checksum(index).hex(),
        prepare_key=key,
        inputs=inputs,
        sources=spool.sources,
        num_records=spool.num_records,
        num_rejects=spool.num_rejects,
        num_duplicates=spool.num_duplicates,
        reject_reasons=spool.reject_reasons,
    )
    if not storage.put_if_absent(manifest_uri(dataset_uri), manifest.to_json().encode()):
        return _reuse(dataset_uri, key, inputs, config)
    return manifest


def _inputs(config: DataConfig, files: list[SourceFile], tokenizer: TokenizerFiles | None) -> dict[str, str]:
    """All that the content of a dataset depends on, by name. Paths do not count, the content of files does."""
    inputs = {
        "format": str(DATASET_VERSION),
        "data.split.eval": repr(config.split.eval),
        "data.split.deduplicate": repr(config.split.deduplicate),
        "data.rejects.max_record_bytes": repr(config.rejects.max_record_bytes),
        "data.shard_tokens": repr(config.shard_tokens),
    }
    if tokenizer is not None:
        inputs["data.tokenizer.path (content)"] = tokenizer.digest
    elif (train := config.tokenizer.to_train) is not None:
        inputs["data.tokenizer.train.vocab_size"] = repr(train.vocab_size)
        inputs["data.tokenizer.train.min_frequency"] = repr(train.min_frequency)
    for number, file in enumerate(files):
        inputs[f"source file {number} (format, text column)"] = f"{file.source.resolved_format}, {file.source.text}"
        inputs[f"source file {number} (content)"] = fingerprint(file.uri)
    return inputs


def _reuse(dataset_uri: str, key: str, inputs: dict[str, str], config: DataConfig) -> DatasetManifest:
    """The dataset that is there, when it is the one asked for."""
    manifest = read_manifest(dataset_uri)
    if manifest.prepare_key == key:
        _check_rejects(config, manifest.num_records, dict(manifest.reject_reasons), dataset_uri)
        return manifest
    differences = [
        f"{name} is {manifest.inputs.get(name, 'absent')} there and {inputs.get(name, 'absent')} here"
        for name in sorted({*manifest.inputs, *inputs})
        if manifest.inputs.get(name) != inputs.get(name)
    ]
    raise ConfigError(
        f"{dataset_uri} holds a dataset that was made of something else: {'; '.join(differences[:8])}. Nothing was "
        "changed. Restore the setting or the file, or choose another data.dataset or run.name."
    )


def _text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _read_sources(
    config: DataConfig,
    files: list[SourceFile],
    inputs: dict[str, str],
    dataset_uri: str,
    work_uri: str,
    report: Callable[[PrepareProgress], None],
) -> _Spool:
    """Read every file once: rejects to `rejects.jsonl`, kept documents to the spool."""
    seen: set[bytes] = set()
    hashes: list[int] = []
    reasons: Counter[str] = Counter()
    sources: list[SourceInfo] = []
    num_records = num_duplicates = 0
    spool = _SpoolWriter(work_uri)
    rejects_uri = storage.join(dataset_uri, "rejects.jsonl")
    with storage.publish(rejects_uri) as rejects:
        for number, file in enumerate(files):
            report(PrepareProgress("read", number, len(files), num_records, sum(reasons.values())))
            before, rejects_before = num_records, sum(reasons.values())
            for record in read_records(file, config.rejects.max_record_bytes):
                num_records += 1
                if isinstance(record, Reject):
                    reasons[record.reason.partition(":")[0]] += 1
                    line = {"file": file.uri, "line": record.line, "reason": record.reason}
                    rejects.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                    continue
                digest = _text_hash(record.text)
                if config.split.deduplicate:
                    if digest in seen:
                        num_duplicates += 1
                        continue
                    seen.add(digest)
                value = int.from_bytes(digest[:8], "little")
                hashes.append(value)
                spool.add(record.text, value)
            sources.append(
                SourceInfo(
                    file=file.uri,
                    digest=inputs[f"source file {number} (content)"],
                    num_records=num_records - before,
                    num_rejects=sum(reasons.values()) - rejects_before,
                )
            )
    spool.close()
    report(PrepareProgress("read", len(files), len(files), num_records, sum(reasons.values())))
    _check_rejects(config, num_records, dict(reasons), dataset_uri)
    if not hashes:
        raise SourceError(
            f"{', '.join(file.uri for file in files[:5])}: {num_records} records were read and none holds text. "
            "Add text, or name another column in data.sources."
        )
    return _Spool(
        chunks=spool.uris,
        sources=tuple(sources),
        num_records=num_records,
        num_duplicates=num_duplicates,
        reject_reasons=dict(sorted(reasons.items())),
        eval_below=_eval_below(config.split.eval, hashes),
    )


def _check_rejects(config: DataConfig, num_records: int, reasons: dict[str, int], dataset_uri: str) -> None:
    num_rejects = sum(reasons.values())
    if num_rejects > config.rejects.max_fraction * num_records:
        causes = ", ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items()))
        raise SourceError(
            f"data.rejects.max_fraction={config.rejects.max_fraction}: {num_rejects} of {num_records} records are bad "
            f"({causes}); {storage.join(dataset_uri, 'rejects.jsonl')} names file, line and reason of each. "
            "Repair the source or raise the limit."
        )


def _eval_below(share: float, hashes: list[int]) -> int:
    """The hash below which a document is held out.

    A small corpus may have no document below `share`, or all: then the one with the smallest hash is held out, or the
    one with the largest is kept, so that both parts have at least one.
    """
    if share == 0.0:
        return 0
    smallest, largest = min(hashes), max(hashes)
    if smallest == largest:
        raise SourceError(
            f"data.split.eval={share}: the sources hold one distinct document, which cannot be both trained on and "
            "held out. Add text, or set data.split.eval=0."
        )
    return min(max(int(share * _HASH_RANGE), smallest + 1), largest)


class _SpoolWriter:
    """Collects documents into Arrow files of about _CHUNK_BYTES of text."""

    def __init__(self, work_uri: str) -> None:
        self.uris: list[str] = []
        self._work_uri = work_uri
        self._texts: list[str] = []
        self._hashes: list[int] = []
        self._size = 0

    def add(self, text: str, value: int) -> None:
        self._texts.append(text)
        self._hashes.append(value)
        self._size += len(text) if text.isascii() else len(text) * 3
        if self._size >= _CHUNK_BYTES:
            self.close()

    def close(self) -> None:
        if not self._texts:
            return
        table = pa.table(
            {"text": pa.array(self._texts, pa.large_string()), "hash": pa.array(self._hashes, pa.uint64())}
        )
        uri = storage.join(self._work_uri, f"chunk-{len(self.uris):06d}.arrow")
        with storage.publish(uri) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        self.uris.append(uri)
        self._texts, self._hashes, self._size = [], [], 0


def _read_chunk(uri: str) -> tuple[list[str], npt.NDArray[np.uint64]]:
    table = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(uri))).read_all()
    return table.column("text").to_pylist(), table.column("hash").to_numpy()


def _train(config: DataConfig, spool: _Spool, report: Callable[[PrepareProgress], None]) -> TokenizerFiles:
    """Train the tokenizer on the training part."""
    train = config.tokenizer.to_train
    if train is None:
        raise ConfigError("data.tokenizer.path is set and no tokenizer was read.")

    def training_texts() -> Iterator[str]:
        for number, uri in enumerate(spool.chunks):
            report(PrepareProgress("tokenizer", number, len(spool.chunks), spool.num_records, spool.num_rejects))
            texts, hashes = _read_chunk(uri)
            yield from (text for text, value in zip(texts, hashes, strict=True) if value >= spool.eval_below)

    return train_tokenizer(train, training_texts())


def _encode_chunk(chunk: _Chunk) -> _Encoded:
    """Encode one chunk; pure in the chunk's content."""
    tokenizer = load_encoder(chunk.tokenizer_uri, chunk.tokenizer_digest)
    texts, hashes = _read_chunk(chunk.uri)
    held_out = hashes < np.uint64(chunk.eval_below)
    encode = partial(encode_documents, tokenizer, eos_id=chunk.eos_id, dtype=np.dtype(chunk.token_dtype))
    return _Encoded(
        {
            "train": encode([text for text, out in zip(texts, held_out, strict=True) if not out]),
            "eval": encode([text for text, out in zip(texts, held_out, strict=True) if out]),
        }
    )


class _ShardWriter:
    """Cuts a stream of documents into shards of a fixed token count."""

    def __init__(self, dataset_uri: str, split: str, shard_tokens: int, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.entries: list[ShardEntry] = []
        self.num_documents = 0
        self.num_tokens = 0
        self._dataset_uri = dataset_uri
        self._split = split
        self._tokens = np.empty(shard_tokens, dtype=dtype)
        self._starts = np.zeros(shard_tokens, dtype=np.bool_)
        self._filled = 0

    def add(self, tokens: npt.NDArray[np.unsignedinteger], lengths: npt.NDArray[np.uint32]) -> None:
        starts = np.zeros(tokens.size, dtype=np.bool_)
        if lengths.size:
            starts[np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])] = True
        self.num_documents += lengths.size
        self.num_tokens += tokens.size
        place = 0
        while place < tokens.size:
            count = min(tokens.size - place, self._tokens.size - self._filled)
            target = slice(self._filled, self._filled + count)
            self._tokens[target] = tokens[place : place + count]
            self._starts[target] = starts[place : place + count]
            self._filled += count
            place += count
            if self._filled == self._tokens.size:
                self.close()

    def close(self) -> None:
        if not self._filled:
            return
        number = len(self.entries)
        data = encode_shard(Shard(self._tokens[: self._filled].copy(), self._starts[: self._filled].copy()))
        storage.write_bytes(storage.join(self._dataset_uri, shard_file(self._split, number)), data)
        self.entries.append(ShardEntry(self._split, number, self._filled, len(data), checksum(data)))
        self._filled = 0


def _write_shards(
    config: DataConfig,
    dataset_uri: str,
    spool: _Spool,
    tokenizer: TokenizerFiles,
    mapper: Mapper,
    report: Callable[[PrepareProgress], None],
) -> tuple[list[ShardEntry], dict[str, SplitInfo]]:
    """Encode the spool through the mapper and write the shards."""
    chunks = [
        _Chunk(
            uri=uri,
            tokenizer_uri=tokenizer_uri(dataset_uri),
            tokenizer_digest=tokenizer.digest,
            eos_id=tokenizer.eos_id,
            token_dtype="uint16" if tokenizer.token_dtype.itemsize == 2 else "uint32",
            eval_below=spool.eval_below,
        )
        for uri in spool.chunks
    ]
    writers = {split: _ShardWriter(dataset_uri, split, config.shard_tokens, tokenizer.token_dtype) for split in SPLITS}
    for number, encoded in enumerate(mapper(_encode_chunk, chunks), start=1):
        for split, writer in writers.items():
            writer.add(*encoded.splits[split])
        report(PrepareProgress("encode", number, len(chunks), spool.num_records, spool.num_rejects))
    for writer in writers.values():
        writer.close()
    infos: dict[str, SplitInfo] = {
        split: SplitInfo(
            num_documents=writer.num_documents,
            num_tokens=writer.num_tokens,
            num_shards=len(writer.entries),
            shard_tokens=config.shard_tokens,
        )
        for split, writer in writers.items()
    }
    _LOG.info("prepared %s: %s", dataset_uri, {split: asdict(info) for split, info in infos.items()})
    return [entry for writer in writers.values() for entry in writer.entries], infos
