"""From sources to a prepared dataset: read, deduplicate, split, train or read the tokenizer, encode, write shards.

    sources ─ readers ─▶ spool of chunks (Arrow, ~1 MiB of text) ─ mapper ─▶ tokens ─▶ shards, index, manifest.json
                 └─ rejects.jsonl         └─ training part ─▶ tokenizer/

Reading, deduplication and writing are serial and in order; encoding a chunk is a pure function of the chunk, so a
mapper may run it anywhere and the bytes of the dataset do not depend on how many did. Memory holds one digest per
document and a few chunks. All files are written into a work folder first, then moved into place; the manifest is
published last and never replaced. On this machine's file systems one process prepares into a folder at a time.

Owns the order of these steps and the identity of a dataset (its prepare key). Refuses to overwrite another dataset.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_service import storage
from data_service.claim import claim_folder
from data_service.config import DataConfig
from data_service.errors import ConfigError, DataUnavailableError, SourceError
from data_service.readers import SourceFile, find_files, fingerprint
from data_service.reuse import find_prepared, missing_files
from data_service.shards import (
    DATASET_VERSION,
    INDEX_FILE,
    SPLITS,
    DatasetManifest,
    Shard,
    ShardEntry,
    SplitInfo,
    checksum,
    encode_shard,
    index_bytes,
    manifest_uri,
    shard_file,
    tokenizer_uri,
)
from data_service.spool import REJECTS_FILE, PrepareProgress, Spool, read_chunk, read_sources
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
class _Request:
    """What is asked for, and the key that makes it the same dataset as another."""

    config: DataConfig
    files: list[SourceFile]
    digests: list[str]
    tokenizer: TokenizerFiles | None
    inputs: dict[str, str]
    key: str


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


def prepare(
    config: DataConfig,
    dataset_uri: str,
    *,
    mapper: Mapper = serial,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> DatasetManifest:
    """Prepare a dataset, or find it prepared.

    Where files of a prepared dataset are gone or of another size, it is written again, which must give the same bytes.

    Args:
        config: the `data` section, its paths resolved.
        dataset_uri: the folder of the dataset; it must be reachable where the mapper runs its items.
        mapper: runs the encoding of chunks.
        progress: called as the work goes on.

    Returns:
        The manifest, of this preparation or of an earlier one with the same key.

    Raises:
        ConfigError: when `dataset_uri` holds a dataset made of something else, naming what differs, or cannot hold one.
        DataUnavailableError: when another process prepares there and does not end.
        SourceError: when a source cannot be used or too many records were rejected.
    """
    request = _request(config)
    found = find_prepared(dataset_uri, request.key, request.inputs, config)
    if found is not None and not missing_files(dataset_uri, found):
        return found
    storage.check_commits(dataset_uri)
    with claim_folder(dataset_uri) as work_uri:
        # Another process may have prepared, or restored, while this one waited.
        found = find_prepared(dataset_uri, request.key, request.inputs, config)
        missing = [] if found is None else missing_files(dataset_uri, found)
        if found is not None and not missing:
            return found
        if missing:
            _LOG.warning(
                "%s: %d files are gone or not as they were written (%s); the dataset is written again",
                dataset_uri,
                len(missing),
                ", ".join(missing[:5]),
            )
        try:
            manifest = _build(request, dataset_uri, work_uri, mapper, progress or (lambda _: None))
        except SourceError:
            if found is None and storage.exists(storage.join(work_uri, REJECTS_FILE)):
                storage.move_file(storage.join(work_uri, REJECTS_FILE), storage.join(dataset_uri, REJECTS_FILE))
            raise
        return _publish(request, manifest, found, dataset_uri, work_uri)


def _request(config: DataConfig) -> _Request:
    """Look at the sources and the tokenizer."""
    files = find_files(config.sources)
    tokenizer = None if config.tokenizer.path is None else read_tokenizer(config.tokenizer.path)
    digests = [fingerprint(file.uri) for file in files]
    inputs = _inputs(config, files, digests, tokenizer)
    key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()
    return _Request(config, files, digests, tokenizer, inputs, key)


def _build(
    request: _Request,
    dataset_uri: str,
    work_uri: str,
    mapper: Mapper,
    report: Callable[[PrepareProgress], None],
) -> DatasetManifest:
    """Write the files of the dataset into the work folder; the manifest is returned and not written."""
    config = request.config
    spool = read_sources(config, request.files, request.digests, dataset_uri, work_uri, report)
    tokenizer = request.tokenizer or _train(config, spool, report)
    write_tokenizer(tokenizer_uri(work_uri), tokenizer)
    entries, splits = _write_shards(config, work_uri, spool, tokenizer, mapper, report)
    index = index_bytes(entries)
    storage.write_bytes(storage.join(work_uri, INDEX_FILE), index)
    token_dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.token_dtype.itemsize == 2 else "uint32"
    content = hashlib.blake2b(f"{DATASET_VERSION}/{token_dtype}/{tokenizer.digest}".encode(), digest_size=16)
    for entry in entries:
        content.update(f"/{entry.split}/{entry.number}/{entry.num_tokens}/".encode() + entry.checksum)
    return DatasetManifest(
        version=DATASET_VERSION,
        digest=content.hexdigest(),
        vocab_size=tokenizer.vocab_size,
        token_dtype=token_dtype,
        eos_id=tokenizer.eos_id,
        splits=splits,
        tokenizer_digest=tokenizer.digest,
        index_digest=checksum(index).hex(),
        prepare_key=request.key,
        inputs=request.inputs,
        sources=spool.sources,
        num_records=spool.num_records,
        num_rejects=spool.num_rejects,
        num_duplicates=spool.num_duplicates,
        reject_reasons=spool.reject_reasons,
    )


def _publish(
    request: _Request, manifest: DatasetManifest, old: DatasetManifest | None, dataset_uri: str, work_uri: str
) -> DatasetManifest:
    """Move the files into place, and the manifest behind them; with an `old` manifest they must be the files it names.

    On a remote store, where no claim keeps others away, the look for a manifest just before leaves only the time of the
    moves in which another preparation could finish; checksums tell the files of the one from the other's.
    """
    if old is None:
        found = find_prepared(dataset_uri, request.key, request.inputs, request.config)
        if found is not None:
            return found
    elif (manifest.digest, manifest.index_digest) != (old.digest, old.index_digest):
        raise ConfigError(
            f"{dataset_uri} has files that are gone or damaged, and preparing again gave other bytes (digest "
            f"{manifest.digest} instead of {old.digest}): another release or tokenizer library wrote it. Nothing was "
            "changed. Restore the files, or delete the folder and prepare again; checkpoints of the old dataset do not "
            "fit the new one."
        )
    shards = [f"shards/{name}" for name in storage.list_names(storage.join(work_uri, "shards"))]
    tokenizer = [f"tokenizer/{name}" for name in storage.list_names(tokenizer_uri(work_uri))]
    for path in [REJECTS_FILE, *tokenizer, *(path for path in shards if path != INDEX_FILE), INDEX_FILE]:
        storage.move_file(storage.join(work_uri, path), storage.join(dataset_uri, path))
    if old is not None:
        _LOG.warning("%s: restored, with the same bytes", dataset_uri)
        return old
    if not storage.put_if_absent(manifest_uri(dataset_uri), manifest.to_json().encode()):
        # Only on a remote store, where another preparation ended in this moment.
        found = find_prepared(dataset_uri, request.key, request.inputs, request.config)
        if found is None:
            raise DataUnavailableError(f"{manifest_uri(dataset_uri)} was there and is gone again. Prepare once more.")
        return found
    _LOG.info("prepared %s: %s", dataset_uri, {split: asdict(info) for split, info in manifest.splits.items()})
    return manifest


def _inputs(
    config: DataConfig, files: list[SourceFile], digests: list[str], tokenizer: TokenizerFiles | None
) -> dict[str, str]:
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
        inputs[f"source file {number} (content)"] = digests[number]
    return inputs


def _train(config: DataConfig, spool: Spool, report: Callable[[PrepareProgress], None]) -> TokenizerFiles:
    """Train the tokenizer on the training part."""
    train = config.tokenizer.to_train
    if train is None:
        raise ConfigError("data.tokenizer.path is set and no tokenizer was read.")

    def training_texts() -> Iterator[str]:
        for number, uri in enumerate(spool.chunks):
            report(PrepareProgress("tokenizer", number, len(spool.chunks), spool.num_records, spool.num_rejects))
            texts, hashes = read_chunk(uri)
            yield from (text for text, value in zip(texts, hashes, strict=True) if value >= spool.eval_below)

    return train_tokenizer(train, training_texts())


def _encode_chunk(chunk: _Chunk) -> _Encoded:
    """Encode one chunk; pure in the chunk's content."""
    tokenizer = load_encoder(chunk.tokenizer_uri, chunk.tokenizer_digest)
    texts, hashes = read_chunk(chunk.uri)
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

    def __init__(self, folder_uri: str, split: str, shard_tokens: int, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.entries: list[ShardEntry] = []
        self.num_documents = 0
        self.num_tokens = 0
        self._folder_uri = folder_uri
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
        storage.write_bytes(storage.join(self._folder_uri, shard_file(self._split, number)), data)
        self.entries.append(ShardEntry(self._split, number, self._filled, len(data), checksum(data)))
        self._filled = 0


def _write_shards(
    config: DataConfig,
    folder_uri: str,
    spool: Spool,
    tokenizer: TokenizerFiles,
    mapper: Mapper,
    report: Callable[[PrepareProgress], None],
) -> tuple[list[ShardEntry], dict[str, SplitInfo]]:
    """Encode the spool through the mapper and write the shards."""
    chunks = [
        _Chunk(
            uri=uri,
            tokenizer_uri=tokenizer_uri(folder_uri),
            tokenizer_digest=tokenizer.digest,
            eos_id=tokenizer.eos_id,
            token_dtype="uint16" if tokenizer.token_dtype.itemsize == 2 else "uint32",
            eval_below=spool.eval_below,
        )
        for uri in spool.chunks
    ]
    writers = {split: _ShardWriter(folder_uri, split, config.shard_tokens, tokenizer.token_dtype) for split in SPLITS}
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
    return [entry for writer in writers.values() for entry in writer.entries], infos
