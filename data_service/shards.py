"""A prepared dataset on storage: its manifest, the index of its shards, and reading a shard with its checksum.

    manifest.json        counts and digests; small at any scale; written last, so a dataset without it does not exist
    shards/index.arrow   one row per shard: split, number, tokens, bytes, checksum
    shards/train-00000.arrow, shards/eval-00000.arrow, …
    tokenizer/           a folder that transformers loads
    rejects.jsonl        records left out: file, line, reason

A shard is an Arrow IPC file of one record batch with the columns `token` (uint16 or uint32) and `starts` (bool: here
a document begins). All shards of a split hold `shard_tokens` tokens, only the last fewer.

Owns this format. Refuses to serve bytes whose checksum differs.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_service import storage
from data_service.errors import ConfigError, ShardCorruptError

__all__ = [
    "DatasetManifest",
    "Shard",
    "ShardEntry",
    "SourceInfo",
    "SplitInfo",
    "checksum",
    "encode_shard",
    "index_bytes",
    "load_shard",
    "manifest_uri",
    "read_index",
    "read_manifest",
    "read_tokens",
    "shard_file",
    "tokenizer_uri",
]

DATASET_VERSION = 1
SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")
INDEX_FILE = "shards/index.arrow"
_INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("number", pa.uint32()),
        ("num_tokens", pa.uint64()),
        ("num_bytes", pa.uint64()),
        ("checksum", pa.binary(16)),
    ]
)


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split."""

    num_documents: int
    num_tokens: int
    num_shards: int
    shard_tokens: int
    """Tokens in every shard but the last."""


@dataclass(frozen=True)
class SourceInfo:
    """One source file as it was read."""

    file: str
    digest: str
    num_records: int
    num_rejects: int


@dataclass(frozen=True)
class DatasetManifest:
    """What `manifest.json` says."""

    version: int
    digest: str
    """BLAKE2b over the content: checksums of the shards, tokenizer and token dtype."""
    vocab_size: int
    token_dtype: Literal["uint16", "uint32"]
    eos_id: int
    splits: Mapping[str, SplitInfo]
    tokenizer_digest: str
    index_digest: str
    prepare_key: str
    inputs: Mapping[str, str]
    """What the key was made of, by dotted name, so that a difference can be named."""
    sources: tuple[SourceInfo, ...]
    num_records: int
    num_rejects: int
    num_duplicates: int
    reject_reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The dtype of a token in the shards and on the wire."""
        return np.dtype(self.token_dtype)

    def to_json(self) -> str:
        """Indented JSON with sorted keys."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "DatasetManifest":
        """The inverse of `to_json`.

        Raises:
            ValueError: when keys are missing or of another version.
        """
        value = json.loads(text)
        if value.get("version") != DATASET_VERSION:
            raise ValueError(f"dataset format {value.get('version')}, this release reads {DATASET_VERSION}.")
        try:
            value["splits"] = {name: SplitInfo(**info) for name, info in value["splits"].items()}
            value["sources"] = tuple(SourceInfo(**info) for info in value["sources"])
            return cls(**value)
        except (KeyError, TypeError) as error:
            raise ValueError(f"fields of the manifest differ: {error}.") from error


@dataclass(frozen=True)
class ShardEntry:
    """One row of the index."""

    split: str
    number: int
    num_tokens: int
    num_bytes: int
    checksum: bytes


@dataclass(frozen=True)
class Shard:
    """The content of a shard."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[S], uint16 or uint32."""
    starts: npt.NDArray[np.bool_]
    """[S]: a document begins here."""

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in memory."""
        return self.tokens.nbytes + self.starts.nbytes


def manifest_uri(dataset_uri: str) -> str:
    """Where the manifest lies."""
    return storage.join(dataset_uri, "manifest.json")


def tokenizer_uri(dataset_uri: str) -> str:
    """The folder that `transformers` loads as a tokenizer."""
    return storage.join(dataset_uri, "tokenizer")


def shard_file(split: str, number: int) -> str:
    """Path of a shard inside its dataset."""
    return f"shards/{split}-{number:05d}.arrow"


def checksum(data: bytes) -> bytes:
    """BLAKE2b-128."""
    return hashlib.blake2b(data, digest_size=16).digest()


def encode_shard(shard: Shard) -> bytes:
    """The bytes of a shard file; equal for equal content."""
    batch = pa.record_batch(
        [
            pa.Array.from_buffers(
                pa.from_numpy_dtype(shard.tokens.dtype), shard.tokens.size, [None, pa.py_buffer(shard.tokens)]
            ),
            pa.Array.from_buffers(
                pa.bool_(), shard.starts.size, [None, pa.py_buffer(np.packbits(shard.starts, bitorder="little"))]
            ),
        ],
        names=["token", "starts"],
    )
    return _ipc_bytes(batch)


def _ipc_bytes(batch: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _ipc_batch(data: bytes) -> pa.RecordBatch:
    reader = pa.ipc.open_file(pa.BufferReader(data))
    if reader.num_record_batches != 1:
        raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches instead of 1")
    return reader.get_batch(0)


def index_bytes(entries: list[ShardEntry]) -> bytes:
    """The bytes of `shards/index.arrow`."""
    rows = [asdict(entry) for entry in entries]
    return _ipc_bytes(pa.RecordBatch.from_pylist(rows, schema=_INDEX_SCHEMA))


def read_manifest(dataset_uri: str) -> DatasetManifest:
    """Read a dataset's manifest.

    Raises:
        ConfigError: when there is no dataset, or one that this release does not read.
    """
    uri = manifest_uri(dataset_uri)
    try:
        return DatasetManifest.from_json(storage.read_bytes(uri).decode())
    except FileNotFoundError as error:
        raise ConfigError(
            f"a prepared dataset was asked for in {dataset_uri}, it holds no manifest.json. Run `stormjib prepare`."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{uri} was asked for, it is not a dataset manifest: {error} Prepare into another folder."
        ) from error


def read_index(dataset_uri: str, manifest: DatasetManifest) -> dict[str, list[ShardEntry]]:
    """The shards of each split, in order.

    Raises:
        ShardCorruptError: when the index is not the one that the manifest names.
    """
    uri = storage.join(dataset_uri, INDEX_FILE)
    data = _read_or_corrupt(uri, "index.arrow")
    if checksum(data).hex() != manifest.index_digest:
        raise ShardCorruptError(
            f"{uri}: its checksum {checksum(data).hex()} is not the manifest's {manifest.index_digest}. "
            "The index was changed or damaged; prepare the dataset again, which restores it."
        )
    index: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for row in _ipc_batch(data).to_pylist():
        index[row["split"]].append(ShardEntry(**row))
    return index


def _read_or_corrupt(uri: str, name: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise ShardCorruptError(
            f"{name} was asked for, {uri} is gone. Prepare the dataset again, which restores it."
        ) from error


def load_shard(dataset_uri: str, entry: ShardEntry) -> Shard:
    """Read a shard, verifying its checksum before anything else looks at it.

    Raises:
        ShardCorruptError: naming the shard, when it is missing or any byte differs.
    """
    name = shard_file(entry.split, entry.number)
    uri = storage.join(dataset_uri, name)
    data = _read_or_corrupt(uri, name)
    if len(data) != entry.num_bytes or checksum(data) != entry.checksum:
        advice = (
            "Prepare the dataset again, which restores it."
            if len(data) != entry.num_bytes
            else f"Its size is right, so that preparing again would not notice: delete the folder {dataset_uri}, or "
            "this file alone, and prepare again."
        )
        raise ShardCorruptError(
            f"{name} was asked for, {uri} holds {len(data)} bytes with checksum {checksum(data).hex()} instead of "
            f"{entry.num_bytes} with {entry.checksum.hex()}. {advice}"
        )
    batch = _ipc_batch(data)
    tokens = batch.column(0).to_numpy(zero_copy_only=True)
    packed = np.frombuffer(batch.column(1).buffers()[1], dtype=np.uint8)
    starts = np.unpackbits(packed, count=tokens.size, bitorder="little").view(np.bool_)
    return Shard(tokens=tokens, starts=starts)


def read_tokens(dataset_uri: str, split: Literal["train", "eval"]) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    """The tokens of a split, shard by shard, in order: uint16 or uint32 [S]."""
    manifest = read_manifest(dataset_uri)
    for entry in read_index(dataset_uri, manifest)[split]:
        yield load_shard(dataset_uri, entry).tokens
