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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_service import storage
from data_service.config import DataConfig
from data_service.errors import ConfigError
from data_service.readers import SourceFile, find_files, fingerprint
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
    read_manifest,
    shard_file,
    tokenizer_uri,
)
from data_service.spool import PrepareProgress, Spool, check_rejects, read_chunk, read_sources
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
    digests = [fingerprint(file.uri) for file in files]
    inputs = _inputs(config, files, digests, tokenizer)
    key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()
    if storage.exists(manifest_uri(dataset_uri)):
        return _reuse(dataset_uri, key, inputs, config)
    report = progress or (lambda _: None)
    work_uri = storage.join(dataset_uri, f"work-{key[:8]}")
    try:
        spool = read_sources(config, files, digests, dataset_uri, work_uri, report)
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


def _reuse(dataset_uri: str, key: str, inputs: dict[str, str], config: DataConfig) -> DatasetManifest:
    """The dataset that is there, when it is the one asked for."""
    manifest = read_manifest(dataset_uri)
    if manifest.prepare_key == key:
        check_rejects(config, manifest.num_records, dict(manifest.reject_reasons), dataset_uri)
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
    spool: Spool,
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
