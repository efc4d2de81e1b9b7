"""From sources to a prepared dataset, stage by stage over an ordered list of work items.

    read          an item per source file   records → chunks of text, hashes, rejects
    deduplicate   an item per hash prefix   the first document of each hash stays
    tokenizer     here                      trained on a sample, or read
    encode        an item per chunk         text → tokens of both splits
    write         an item per part          tokens → shards; then index, counts and manifest

An item is a pure function of its input, so a mapper may run it anywhere and the bytes of the dataset do not depend on
how many did. Each is recorded when it is finished: a preparation that was killed goes on behind what it finished. Files
are written into a work folder first, then moved into place; the manifest is published last and never replaced. On this
machine's file systems one process prepares into a folder at a time.

Owns the order of these stages, and what is published. Refuses to overwrite another dataset.
"""

import contextlib
import errno
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version

from data_service import storage
from data_service.claim import claim_folder, remove_leftovers, work_folder
from data_service.config import DataConfig
from data_service.errors import ConfigError, DataError, DataUnavailableError, SourceError
from data_service.generations import InputFile, Request, Target, files_of, find_target, known_files, look_at
from data_service.kept_reading import keep_reading
from data_service.manifest import DatasetManifest, check_no_gap, manifest_name, read_manifests
from data_service.mapping import Mapper, serial
from data_service.progress import PrepareProgress, Report
from data_service.publish import Assembly, assemble, move_into_place, warnings_of
from data_service.reading import read_all
from data_service.reuse import missing_files
from data_service.spool import rejects_file
from data_service.stages import (
    Job,
    Sizes,
    deduplicate,
    encode_all,
    eval_below_of,
    labels_of,
    tokenizer_of,
    write_all,
)

__all__ = ["PrepareProgress", "prepare"]

_LOG = logging.getLogger(__name__)
_SIZES = Sizes()
_WORK_VERSION = 2
"""Changes whenever the files of a work folder would mean something else."""


def prepare(
    config: DataConfig, dataset_uri: str, *, mapper: Mapper = serial, progress: Report | None = None
) -> DatasetManifest:
    """Prepare a dataset, add files to it, or find it prepared.

    Where files of the generations asked for are gone or of another size, those are written again, which must give the
    same bytes.

    Args:
        config: the `data` section, its paths resolved.
        dataset_uri: the folder of the dataset; it must be reachable where the mapper runs its items.
        mapper: runs the work items.
        progress: called as the work goes on.

    Returns:
        The manifest of the generation that holds the files of `config`, of this preparation or of an earlier one.

    Raises:
        ConfigError: when `dataset_uri` holds a dataset made of something else, naming what differs, or cannot hold one.
        DataUnavailableError: when another process prepares there and does not end, or something cannot be read or
            written now; what was finished is kept.
        SourceError: when a source cannot be used or too many records were rejected.
    """
    report = progress or (lambda _: None)
    with _told_failures(dataset_uri):
        request = look_at(config, known_files(read_manifests(dataset_uri)), report)
        target = _target(request, dataset_uri)
        if target.manifest is not None and not _damaged(dataset_uri, target):
            remove_leftovers(dataset_uri)
            return target.manifest
        storage.check_commits(dataset_uri)
    with claim_folder(dataset_uri), _told_failures(dataset_uri):
        # Another process may have prepared, or restored, while this one waited, and sources may have changed.
        if storage.is_local(dataset_uri):
            request = look_at(config, {(one.file.uri, one.state): one.digest for one in request.files}, report)
        target = _target(request, dataset_uri)
        for manifest, missing in _damaged(dataset_uri, target):
            _LOG.warning(
                "%s: %d files are gone or not as they were written (%s); they are written again",
                dataset_uri,
                len(missing),
                ", ".join(missing[:5]),
            )
            earlier = target.generations[: manifest.generation]
            files = files_of(request, manifest, manifest.generation)
            _restore(_job(request, files, earlier, dataset_uri, mapper, report), manifest)
        if target.manifest is not None:
            return target.manifest
        return _add(_job(request, target.new_files, target.generations, dataset_uri, mapper, report))


@contextlib.contextmanager
def _told_failures(dataset_uri: str) -> Iterator[None]:
    """What the file system or the store refuses becomes an error that says where, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = (
            "Make room there (about twice the text is needed), or set data.dataset to a folder with more."
            if full
            else "Prepare again when it can be reached, or set data.dataset to another folder."
        )
        raise DataUnavailableError(
            f"{error.filename or dataset_uri}: preparing {dataset_uri} failed ({error.strerror or error}). What was "
            f"finished is kept. {hint}"
        ) from error


def _target(request: Request, dataset_uri: str) -> Target:
    manifests = read_manifests(dataset_uri)
    check_no_gap(dataset_uri, len(manifests))
    return find_target(request, manifests, dataset_uri)


def _damaged(dataset_uri: str, target: Target) -> list[tuple[DatasetManifest, list[str]]]:
    """Generations that are not whole, oldest first, with the paths of what is gone."""
    found = [(manifest, missing_files(dataset_uri, manifest)) for manifest in target.generations]
    return [(manifest, missing) for manifest, missing in found if missing]


def _job(
    request: Request,
    files: tuple[InputFile, ...],
    earlier: tuple[DatasetManifest, ...],
    dataset_uri: str,
    mapper: Mapper,
    report: Report,
) -> Job:
    """A generation to prepare, in a work folder.

    On this machine that of its settings, with what was read before of the files asked for; on a store, where others may
    be at work, that of just this work.
    """
    identities = [json.dumps([*one.identity, one.named, request.columns_of(one)], ensure_ascii=False) for one in files]
    local = storage.is_local(dataset_uri)
    parts = {
        "work": _WORK_VERSION,
        "libraries": [version(name) for name in ("stormjib", "tokenizers")],
        "sizes": asdict(_SIZES),
        "settings": request.common_settings,
        "files": [] if local else identities,
        "generation": len(earlier),
        "base": earlier[-1].digest if earlier else None,
    }
    key = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
    work_uri = work_folder(dataset_uri, key)
    if local:
        keep_reading(work_uri, identities)
    return Job(request, files, earlier, dataset_uri, work_uri, mapper, report, _SIZES)


def _build(job: Job) -> Assembly:
    """Make the files of a generation in the work folder."""
    spool = read_all(job)
    labels = labels_of(job, spool)
    eval_below = eval_below_of(job, spool)
    duplicates = deduplicate(job, spool)
    tokenizer = tokenizer_of(job, spool, duplicates, eval_below)
    encoded = encode_all(job, spool, duplicates, tokenizer, eval_below, labels)
    parts = write_all(job, spool, encoded, labels)
    return assemble(job, spool, duplicates, tokenizer, eval_below, labels, encoded, parts)


def _add(job: Job) -> DatasetManifest:
    """Prepare a generation and publish it.

    On a remote store, where no claim keeps others away, the look for a manifest just before leaves only the time of the
    moves in which another preparation could finish; checksums tell the files of the one from the other's.
    """
    uri = storage.join(job.dataset_uri, manifest_name(job.generation))
    try:
        assembly = _build(job)
        found = _found_meanwhile(job)
    except FileNotFoundError:
        # On a remote store another preparation of the same thing may end, and take the work folder away.
        found = _found_meanwhile(job)
        if found is None:
            raise
        return found
    except (ConfigError, SourceError) as error:
        rejects = rejects_file(job.generation)
        if storage.exists(storage.join(job.work_uri, rejects)) and not storage.exists(uri):
            storage.move_file(storage.join(job.work_uri, rejects), storage.join(job.dataset_uri, rejects))
        if isinstance(error, ConfigError):
            # Nothing that was done is of use for what will be asked for next.
            storage.remove_tree(job.work_uri)
        # Else what was read of the other files is, once one is mended or a limit raised.
        raise
    if found is None:
        move_into_place(job, assembly, is_new=True)
        manifest = assembly.manifest
        if storage.put_if_absent(uri, manifest.to_json().encode()):
            found = manifest
            for line in warnings_of(job, manifest):
                _LOG.warning("%s", line)
            _LOG.info(
                "prepared %s, generation %d: %d documents, %d tokens, %d shards",
                job.dataset_uri,
                job.generation,
                manifest.num_documents(),
                manifest.num_tokens(),
                manifest.num_shards,
            )
        else:
            # Only on a remote store, where another preparation ended in this moment.
            found = _found_meanwhile(job)
    storage.remove_tree(job.work_uri)
    if found is None:
        raise DataUnavailableError(f"{job.dataset_uri}: another preparation ended meanwhile. Prepare once more.")
    return found


def _found_meanwhile(job: Job) -> DatasetManifest | None:
    """What was asked for, when another preparation has finished it on a remote store.

    Raises:
        ConfigError: when it was another dataset that was finished.
    """
    if storage.is_local(job.dataset_uri):
        return None
    return _target(job.request, job.dataset_uri).manifest


def _restore(job: Job, old: DatasetManifest) -> None:
    """Write the files of a generation again; they must be those that its manifest names."""
    assembly = _build(job)
    made = assembly.manifest
    if (made.digest, made.index_digests) != (old.digest, old.index_digests):
        storage.remove_tree(job.work_uri)
        raise ConfigError(
            f"{job.dataset_uri} has files that are gone or damaged, and preparing again gave other bytes (digest "
            f"{made.digest} instead of {old.digest}): another release or tokenizer library wrote it. Nothing was "
            "changed. Restore the files, or delete the folder and prepare again; checkpoints of the old dataset do not "
            "fit the new one."
        )
    move_into_place(job, assembly, is_new=False)
    still = missing_files(job.dataset_uri, old)
    if still:
        raise DataError(
            f"{job.dataset_uri}: files were written again, and {', '.join(still[:5])} still are not as the manifest "
            "says. Delete the folder and prepare again."
        )
    storage.remove_tree(job.work_uri)
    _LOG.warning("%s: restored, with the same bytes", job.dataset_uri)
