"""Whether all files of a generation are there.

Looks at the index, the tokenizer, rejects and counts by content, at shards and hashes by their size, since reading them
all would take as long as preparing. Changes nothing.
"""

from collections.abc import Mapping

from data_service import storage
from data_service.errors import ShardCorruptError
from data_service.hash_files import HASH, HashFile, hashes_file
from data_service.manifest import SPLITS, DatasetManifest, index_file
from data_service.shards import ShardIndex, checksum, shard_file
from data_service.side_files import damaged_side_files

__all__ = ["missing_files"]


def missing_files(dataset_uri: str, manifest: DatasetManifest) -> list[str]:
    """Paths in the dataset of what a generation wrote and is gone, or not as it was written."""
    generation = manifest.generation
    missing = damaged_side_files(dataset_uri, manifest)
    sizes = storage.list_sizes(dataset_uri)
    if manifest.inputs.get("data.split.deduplicate") == "True":
        name = hashes_file(generation)
        try:
            if HashFile(storage.join(dataset_uri, name), HASH).num_bytes != sizes.get(name):
                missing.append(name)
        except ShardCorruptError:
            missing.append(name)
    shard_sizes = storage.list_sizes(storage.join(dataset_uri, "shards"))
    pages = [index_file(generation, page) for page in range(len(manifest.index_digests))]
    for name, digest in zip(pages, manifest.index_digests, strict=True):
        if name.rpartition("/")[2] not in shard_sizes:
            missing.append(name)
        elif checksum(storage.read_bytes(storage.join(dataset_uri, name))).hex() != digest:
            missing.append(name)
    if not set(missing) & set(pages):
        missing += _missing_shards(dataset_uri, manifest, shard_sizes)
    return missing


def _missing_shards(dataset_uri: str, manifest: DatasetManifest, sizes: Mapping[str, int]) -> list[str]:
    index = ShardIndex(dataset_uri, manifest)
    missing = []
    for split in SPLITS:
        for part in manifest.parts(split):
            if part.generation != manifest.generation:
                continue
            for number in range(part.first_shard, part.first_shard + part.num_shards):
                name = shard_file(split, number)
                if sizes.get(name.rpartition("/")[2]) != index.entry(split, number).num_bytes:
                    missing.append(name)
    return missing
