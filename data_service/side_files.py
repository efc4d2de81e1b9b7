"""The files of a generation beside its shards: which they are, their checksums, and those that belong to none.

    rejects*.jsonl, stats*.json, tokenizer/*    named by the manifest with size and checksum
    hashes*.bin                                 by its own checksums; read from the size in its header here

A preparation that was killed while it moved its files into place leaves some that no manifest speaks of. They must not
become part of the next dataset.

Owns this comparison and the removal. Refuses to touch a file whose name is not one of a dataset's.
"""

import hashlib
import re
from collections.abc import Collection, Mapping

from data_service import storage
from data_service.manifest import SPLITS, DatasetManifest, tokenizer_uri
from data_service.tokenizer import TOKENIZER_FILES

__all__ = ["damaged_side_files", "digest_of", "remove_unlisted_tokenizer", "remove_unpublished"]

_BLOCK = 1 << 20
_GENERATION = re.compile(r"(?:rejects|stats|hashes)(?:\.([0-9]{5,}))?\.(?:jsonl|json|bin)")
_INDEX = re.compile(r"index(?:\.([0-9]{5,}))?-[0-9]{5,}\.arrow")
_SHARD = re.compile(r"(train|eval)-([0-9]{5,})\.arrow")
_FOLDER = "tokenizer"


def digest_of(uri: str) -> tuple[int, str]:
    """Bytes of a file, and their BLAKE2b-128."""
    state = hashlib.blake2b(digest_size=16)
    size = 0
    with storage.open_input(uri) as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
            size += len(block)
    return size, state.hexdigest()


def damaged_side_files(dataset_uri: str, manifest: DatasetManifest) -> list[str]:
    """Paths of what the manifest names and is gone, or not as it was written; `tokenizer` for files of that folder."""
    sizes = dict(storage.list_sizes(dataset_uri))
    in_folder = storage.list_sizes(tokenizer_uri(dataset_uri)) if manifest.generation == 0 else {}
    sizes.update({f"{_FOLDER}/{name}": size for name, size in in_folder.items() if name in TOKENIZER_FILES})
    damaged: dict[str, None] = {}
    for path, (size, digest) in manifest.side_files.items():
        if sizes.get(path) != size or digest_of(storage.join(dataset_uri, path))[1] != digest:
            damaged[_FOLDER if path.startswith(f"{_FOLDER}/") else path] = None
    if any(path.startswith(f"{_FOLDER}/") and path not in manifest.side_files for path in sizes):
        damaged[_FOLDER] = None
    return list(damaged)


def remove_unlisted_tokenizer(dataset_uri: str, listed: Collection[str]) -> None:
    """Remove files of the tokenizer's names that are not among these paths in the dataset."""
    for name in storage.list_sizes(tokenizer_uri(dataset_uri)):
        if name in TOKENIZER_FILES and f"{_FOLDER}/{name}" not in listed:
            storage.remove_file(storage.join(tokenizer_uri(dataset_uri), name))


def remove_unpublished(dataset_uri: str, base: DatasetManifest | None, wanted: Collection[str]) -> list[str]:
    """Remove what belongs to no generation up to `base`, the newest that is published, and is not wanted.

    Args:
        dataset_uri: the folder; claimed, where it is on this machine.
        base: None where there is no manifest yet.
        wanted: paths in the dataset of what is about to be moved there.

    Returns:
        The paths that were removed.
    """
    generation = -1 if base is None else base.generation
    num_shards: Mapping[str, int] = {
        split: 0 if base is None else sum(part.num_shards for part in base.splits[split]) for split in SPLITS
    }
    found = [name for name in storage.list_sizes(dataset_uri) if _number(_GENERATION, name) > generation]
    for name in storage.list_sizes(storage.join(dataset_uri, "shards")):
        shard = _SHARD.fullmatch(name)
        behind = shard is not None and int(shard[2]) >= num_shards[shard[1]]
        if behind or _number(_INDEX, name) > generation:
            found.append(f"shards/{name}")
    if base is None:
        in_folder = storage.list_sizes(tokenizer_uri(dataset_uri))
        found += [f"{_FOLDER}/{name}" for name in in_folder if name in TOKENIZER_FILES]
    gone = sorted(path for path in found if path not in wanted)
    for path in gone:
        storage.remove_file(storage.join(dataset_uri, path))
    return gone


def _number(pattern: re.Pattern[str], name: str) -> int:
    """The generation in a file's name, 0 where it names none; -1 for other files."""
    found = pattern.fullmatch(name)
    return -1 if found is None else int(found[1] or 0)
