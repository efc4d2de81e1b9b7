"""A dataset that is there already: whether it is the one asked for, and whether all its files are.

Owns the comparison of prepare keys and the look at the files (the index and the tokenizer by content, shards by their
size, since reading them all would take as long as preparing). Changes nothing.
"""

from collections.abc import Mapping

from data_service import storage
from data_service.config import DataConfig
from data_service.errors import ConfigError, ShardCorruptError
from data_service.shards import (
    INDEX_FILE,
    DatasetManifest,
    manifest_uri,
    read_index,
    read_manifest,
    shard_file,
    tokenizer_uri,
)
from data_service.spool import check_rejects
from data_service.tokenizer import folder_digest

__all__ = ["find_prepared", "missing_files"]


def find_prepared(dataset_uri: str, key: str, inputs: Mapping[str, str], config: DataConfig) -> DatasetManifest | None:
    """The manifest that is there, when it is of the dataset asked for; None when there is none.

    Raises:
        ConfigError: when it is of another one, naming what differs.
        SourceError: when it left out more records than the configuration now allows.
    """
    if not storage.exists(manifest_uri(dataset_uri)):
        return None
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


def missing_files(dataset_uri: str, manifest: DatasetManifest) -> list[str]:
    """Paths in the dataset of what is gone, or not of its size, or (index and tokenizer) not of its content."""
    missing = [] if folder_digest(tokenizer_uri(dataset_uri)) == manifest.tokenizer_digest else ["tokenizer"]
    try:
        index = read_index(dataset_uri, manifest)
    except ShardCorruptError:
        return [*missing, INDEX_FILE]
    sizes = storage.list_sizes(storage.join(dataset_uri, "shards"))
    for entries in index.values():
        for entry in entries:
            name = shard_file(entry.split, entry.number)
            if sizes.get(name.rpartition("/")[2]) != entry.num_bytes:
                missing.append(name)
    return missing
