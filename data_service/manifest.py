"""What `manifest.json` of a prepared dataset says: counts and digests, small at any scale.

    manifest.json              the dataset as it was first prepared; written last, and never replaced
    manifest.00001.json, …     one more for each later preparation that added files (a generation)
    shards/index-00000.arrow   the index of shards in pages of INDEX_PAGE entries
    shards/index.00001-00000.arrow         one index more for each later generation, of all shards up to it
    shards/train-00000.arrow, shards/eval-00000.arrow, …
    tokenizer/                 a folder that transformers loads
    rejects.jsonl, rejects.00001.jsonl, …  records left out, per generation: file, line, reason
    stats.json, stats.00001.json, …        lengths and counts per source, of all generations up to this one

A later generation holds all shards of the one before it, and more: an older manifest stays true for the runs that
began with it. Owns these names and the dataclasses behind them. Knows nothing of shards' bytes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import numpy as np

from data_service import storage
from data_service.config import RowKind
from data_service.errors import ConfigError

__all__ = [
    "DATASET_VERSION",
    "INDEX_PAGE",
    "SPLITS",
    "DatasetManifest",
    "PartInfo",
    "SourceFileInfo",
    "check_no_gap",
    "index_file",
    "manifest_name",
    "read_manifest",
    "read_manifests",
    "sources_without_rows",
    "tokenizer_uri",
]

DATASET_VERSION = 2
INDEX_PAGE = 4096
"""Entries in a page of the index, about 160 kB: what a jump to a shard out of millions has to read."""
SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")
_MAX_GENERATIONS = 10_000
_MANIFEST = re.compile(r"manifest\.[0-9]{5,}\.json")


@dataclass(frozen=True)
class PartInfo:
    """The shards that one preparation wrote of one source in one split; the unit that is ragged at its end."""

    source: str
    generation: int
    num_documents: int
    num_tokens: int
    """End tokens included, the repeated token at a shard's end and padding not."""
    num_rows: int
    """Rows that are fixed at prepare; 0 with stream rows, whose number follows from seq_len."""
    first_shard: int
    """Number of its first shard in the split."""
    num_shards: int


@dataclass(frozen=True)
class SourceFileInfo:
    """One source file as it was read."""

    source: str
    file: str
    digest: str
    generation: int
    num_records: int
    num_rejects: int
    state: str = ""
    """Size, time of the last change and inode of a local file when its content had the digest; see `source_state`."""


@dataclass(frozen=True)
class DatasetManifest:
    """A prepared dataset, as it stood after one of its generations."""

    version: int
    digest: str
    """BLAKE2b-128 over the content: checksums of the shards in order, tokenizer, dtype, kind of rows."""
    generation: int
    rows: RowKind
    row_tokens: int
    """Tokens of a row, seq_len + 1, where rows are fixed at prepare; 0 with stream rows."""
    shard_tokens: int
    """stream: tokens of every shard of a part but its last."""
    shard_rows: int
    """document and packed: rows of every shard of a part but its last; 0 with stream rows."""
    vocab_size: int
    token_dtype: Literal["uint16", "uint32"]
    eos_id: int
    labels: tuple[str, ...]
    """Classes in the order of their numbers; empty where rows carry none."""
    loss_masks: bool
    """Whether shards hold a mask of the tokens whose prediction counts (chats)."""
    splits: Mapping[str, tuple[PartInfo, ...]]
    """Split → parts, in the order of (generation, source); a part without shards is left out."""
    num_shards: int
    """Shards of both splits: entries of the index."""
    index_digests: tuple[str, ...]
    """BLAKE2b-128 of each page of the index, as hexadecimal digits."""
    tokenizer_digest: str
    eval_below: int
    """A document whose text hash (first 8 bytes, little-endian) is below this is held out."""
    prepare_key: str
    inputs: Mapping[str, str]
    """What the key was made of, by dotted name, so that a difference can be named."""
    files: tuple[SourceFileInfo, ...]
    num_records: int
    num_rejects: int
    num_duplicates: int
    num_truncated: int
    """Chats and labelled texts that lost their end."""
    reject_reasons: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason → documents without a label that counts, which are in no row; not among the rejects."""
    base: str | None = None
    """The digest of the generation before; None in the first."""
    side_files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Path of a file that this generation wrote beside shards and hashes → its bytes and BLAKE2b-128."""

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The dtype of a token in the shards and on the wire."""
        return np.dtype(self.token_dtype)

    def num_documents(self, split: str | None = None) -> int:
        """Documents of a split, or of both."""
        return sum(part.num_documents for part in self.parts(split))

    def num_tokens(self, split: str | None = None) -> int:
        """Tokens of a split, or of both."""
        return sum(part.num_tokens for part in self.parts(split))

    def parts(self, split: str | None = None) -> tuple[PartInfo, ...]:
        """Parts of a split, or of both."""
        return tuple(part for name in SPLITS if split in (None, name) for part in self.splits[name])

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
        found = value.get("version") if isinstance(value, dict) else None
        if found != DATASET_VERSION:
            raise ValueError(f"dataset format {found}, this release reads {DATASET_VERSION}.")
        try:
            value["splits"] = {name: tuple(PartInfo(**part) for part in value["splits"][name]) for name in SPLITS}
            value["files"] = tuple(SourceFileInfo(**info) for info in value["files"])
            for name in ("labels", "index_digests"):
                value[name] = tuple(value[name])
            value["side_files"] = {path: (size, digest) for path, (size, digest) in value["side_files"].items()}
            if value["rows"] not in get_args(RowKind):
                raise ValueError(f"rows of kind {value['rows']!r}.")
            return cls(**value)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"fields of the manifest differ: {error}.") from error


def sources_without_rows(manifest: DatasetManifest, split: str = "train") -> dict[str, str]:
    """Sources that files were read of, and that have no documents in a split: name → why."""
    there = {part.source for part in manifest.splits[split] if part.num_documents}
    read: dict[str, list[SourceFileInfo]] = {}
    for file in manifest.files:
        if file.source not in there:
            read.setdefault(file.source, []).append(file)
    found = {}
    for source, files in read.items():
        records, rejects = sum(file.num_records for file in files), sum(file.num_rejects for file in files)
        why = (
            "all of them were rejected"
            if records == rejects
            else f"{rejects} were rejected, the others repeat texts read before, or are held out or left out"
        )
        found[source] = f"no row of the {split} split came of its {records} records: {why}"
    return found


def manifest_name(generation: int) -> str:
    """File name of a generation's manifest."""
    return "manifest.json" if generation == 0 else f"manifest.{generation:05d}.json"


def index_file(generation: int, page: int) -> str:
    """Path of a page of a generation's index inside its dataset."""
    return f"shards/index-{page:05d}.arrow" if generation == 0 else f"shards/index.{generation:05d}-{page:05d}.arrow"


def tokenizer_uri(dataset_uri: str) -> str:
    """The folder that `transformers` loads as a tokenizer."""
    return storage.join(dataset_uri, "tokenizer")


def read_manifests(dataset_uri: str) -> list[DatasetManifest]:
    """All generations, oldest first; empty where there is no dataset.

    Raises:
        ConfigError: when one is of a kind that this release does not read, or does not follow from the one before.
    """
    found: list[DatasetManifest] = []
    for generation in range(_MAX_GENERATIONS):
        uri = storage.join(dataset_uri, manifest_name(generation))
        try:
            one = DatasetManifest.from_json(storage.read_bytes(uri).decode())
        except FileNotFoundError:
            break
        except ValueError as error:
            raise ConfigError(
                f"{uri} was asked for, it is not a dataset manifest: {error} Prepare into another folder."
            ) from error
        _check_chain(uri, one, found)
        found.append(one)
    return found


def _check_chain(uri: str, manifest: DatasetManifest, before: list[DatasetManifest]) -> None:
    base = before[-1].digest if before else None
    if (manifest.generation, manifest.base) != (len(before), base):
        raise ConfigError(
            f"{uri} was asked for as generation {len(before)}"
            + (f" of the dataset {base}" if base is not None else "")
            + f"; it is generation {manifest.generation}"
            + (f" and was added to the dataset {manifest.base}" if manifest.base is not None else "")
            + ". Files of two datasets are mixed: restore the folder, or prepare into another data.dataset."
        )


def check_no_gap(dataset_uri: str, num_generations: int) -> None:
    """Refuse a folder that holds a later manifest than those that were read one after the other.

    Raises:
        ConfigError: naming the manifest whose base is gone.
    """
    # The next one may have been published since; what is behind it cannot have been.
    known = {manifest_name(generation) for generation in range(num_generations + 1)}
    later = [name for name in storage.list_names(dataset_uri) if _MANIFEST.fullmatch(name) and name not in known]
    if later and not storage.exists(storage.join(dataset_uri, manifest_name(num_generations))):
        raise ConfigError(
            f"{dataset_uri} holds {later[0]}, and {manifest_name(num_generations)}, which it was added to, is gone. "
            f"Nothing was changed. Restore {manifest_name(num_generations)}, or choose another data.dataset."
        )


def read_manifest(dataset_uri: str, digest: str | None = None) -> DatasetManifest:
    """The newest manifest of a dataset, or the one of a digest.

    Raises:
        ConfigError: when there is no dataset, none of that digest, or one that this release does not read.
    """
    found = read_manifests(dataset_uri)
    if not found:
        raise ConfigError(
            f"a prepared dataset was asked for in {dataset_uri}, it holds no manifest.json. Run `stormjib prepare`."
        )
    if digest is None:
        return found[-1]
    for manifest in found:
        if manifest.digest == digest:
            return manifest
    raise ConfigError(
        f"the dataset {digest} was asked for in {dataset_uri}, which holds "
        f"{', '.join(manifest.digest for manifest in found)}. Name the folder that the run was prepared in."
    )
