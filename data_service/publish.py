"""From finished parts to a generation of the dataset: index, counts, manifest, and all files moved into place.

Owns the numbering of shards in the dataset and its digest. Writes nothing into the dataset but by `move_into_place`.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from data_service import storage
from data_service.counts import NO_ANSWER, SourceCounts, counts_to_json, merged_counts, read_counts, stats_file
from data_service.dedupe import Duplicates
from data_service.errors import ConfigError
from data_service.hash_files import hashes_file
from data_service.manifest import (
    DATASET_VERSION,
    INDEX_PAGE,
    SPLITS,
    DatasetManifest,
    PartInfo,
    SourceFileInfo,
    index_file,
    sources_without_rows,
)
from data_service.plan import MAX_PARTS
from data_service.shard_writer import PartShards, shard_path
from data_service.shards import ShardEntry, ShardIndex, checksum, encode_index_page, shard_file
from data_service.side_files import digest_of, remove_unlisted_tokenizer, remove_unpublished
from data_service.spool import FileSpool, Spool, rejects_file
from data_service.stages import Encoded, Job, TokenizerPlace

__all__ = ["Assembly", "assemble", "move_into_place", "warnings_of"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """A generation whose files lie in the work folder."""

    manifest: DatasetManifest
    moves: tuple[tuple[str, str], ...]
    """Path in the work folder → path in the dataset, in the order in which to move."""


def assemble(
    job: Job,
    spool: Spool,
    duplicates: Duplicates,
    tokenizer: TokenizerPlace,
    eval_below: int,
    labels: tuple[str, ...],
    encoded: Encoded,
    parts: dict[tuple[str, str], PartShards],
) -> Assembly:
    """Write index and counts into the work folder, and make the manifest, which is not written."""
    config, base, generation = job.config, job.base, job.generation
    infos: dict[str, tuple[PartInfo, ...]] = {}
    shard_moves = []
    for split in SPLITS:
        before = base.splits[split] if base is not None else ()
        infos[split] = (*before, *_part_infos(job, split, before, parts))
        for info in infos[split][len(before) :]:
            place = job.sources.index(info.source)
            for number in range(info.num_shards):
                source, target = shard_path(split, place, number), shard_file(split, info.first_shard + number)
                shard_moves.append((source, target))
        if len(infos[split]) > MAX_PARTS:
            raise ConfigError(
                f"{job.dataset_uri} would have {len(infos[split])} parts in the {split} split, one for each source and "
                f"preparation, at most {MAX_PARTS} are served. Prepare all files at once into another data.dataset."
            )
    row_tokens = 0 if config.rows == "stream" else config.seq_len + 1
    identity = json.dumps([DATASET_VERSION, config.rows, row_tokens, tokenizer.token_dtype, tokenizer.files.digest])
    content = hashlib.blake2b(identity.encode(), digest_size=16)
    content.update(json.dumps([labels, job.loss_masks]).encode())
    digests = []
    for page, entries in enumerate(_pages(_entries(job, infos, parts))):
        for entry in entries:
            content.update(f"/{entry.split}/{entry.number}/{entry.num_tokens}/".encode() + entry.checksum)
        data = encode_index_page(entries)
        storage.write_bytes(storage.join(job.work_uri, index_file(generation, page)), data)
        digests.append(checksum(data).hex())
    counts = _counts(job, spool, duplicates, encoded, parts)
    everything = counts if base is None else merged_counts([*read_counts(job.dataset_uri, base.generation), *counts])
    storage.write_bytes(storage.join(job.work_uri, stats_file(generation)), counts_to_json(everything).encode())
    sides = [rejects_file(generation), stats_file(generation)]
    if base is None:
        sides += [f"tokenizer/{name}" for name, _ in tokenizer.files.files]
    reasons = Counter(spool.reject_reasons)
    reasons.update(base.reject_reasons if base is not None else {})
    manifest = DatasetManifest(
        version=DATASET_VERSION,
        digest=content.hexdigest(),
        generation=generation,
        rows=config.rows,
        row_tokens=row_tokens,
        shard_tokens=config.shard_tokens,
        shard_rows=max(1, config.shard_tokens // row_tokens) if row_tokens else 0,
        vocab_size=tokenizer.files.vocab_size,
        token_dtype=tokenizer.token_dtype,
        eos_id=tokenizer.files.eos_id,
        labels=labels,
        loss_masks=job.loss_masks,
        splits=infos,
        num_shards=sum(part.num_shards for split in SPLITS for part in infos[split]),
        index_digests=tuple(digests),
        tokenizer_digest=tokenizer.files.digest,
        eval_below=eval_below,
        prepare_key=job.request.key,
        inputs=job.request.settings,
        files=(*(base.files if base is not None else ()), *_file_infos(job, spool)),
        num_records=spool.num_records + (base.num_records if base is not None else 0),
        num_rejects=spool.num_rejects + (base.num_rejects if base is not None else 0),
        num_duplicates=duplicates.total + (base.num_duplicates if base is not None else 0),
        num_truncated=sum(p.num_truncated for p in parts.values()) + (base.num_truncated if base is not None else 0),
        reject_reasons=dict(sorted(reasons.items())),
        left_out=dict(sum((Counter(one.left_out) for one in everything), Counter())),
        base=None if base is None else base.digest,
        side_files={path: digest_of(storage.join(job.work_uri, path)) for path in sides},
    )
    moves = [(path, path) for path in sides]
    if config.split.deduplicate:
        moves.append((hashes_file(generation), hashes_file(generation)))
    pages = [(index_file(generation, page), index_file(generation, page)) for page in range(len(digests))]
    return Assembly(manifest, (*moves, *shard_moves, *pages))


def _part_infos(
    job: Job, split: str, before: tuple[PartInfo, ...], parts: dict[tuple[str, str], PartShards]
) -> Iterator[PartInfo]:
    first = sum(part.num_shards for part in before)
    for source in job.sources:
        part = parts.get((split, source))
        if part is None or not part.shards:
            continue
        yield PartInfo(
            source=source,
            generation=job.generation,
            num_documents=part.num_documents,
            num_tokens=part.num_tokens,
            num_rows=part.num_rows,
            first_shard=first,
            num_shards=len(part.shards),
        )
        first += len(part.shards)


def _entries(
    job: Job, infos: dict[str, tuple[PartInfo, ...]], parts: dict[tuple[str, str], PartShards]
) -> Iterator[ShardEntry]:
    """All shards of the dataset, those of earlier generations as their index tells."""
    earlier = None if job.base is None else ShardIndex(job.dataset_uri, job.base)
    for split in SPLITS:
        if earlier is not None:
            yield from earlier.entries(split)
        for info in infos[split]:
            if info.generation == job.generation:
                for number, shard in enumerate(parts[split, info.source].shards, start=info.first_shard):
                    yield ShardEntry(split, number, shard.num_tokens, shard.num_rows, shard.num_bytes, shard.checksum)


def _pages(entries: Iterator[ShardEntry]) -> Iterator[list[ShardEntry]]:
    page: list[ShardEntry] = []
    for entry in entries:
        page.append(entry)
        if len(page) == INDEX_PAGE:
            yield page
            page = []
    if page:
        yield page


def _file_infos(job: Job, spool: Spool) -> Iterator[SourceFileInfo]:
    for one, file in zip(job.files, spool.files, strict=True):
        yield SourceFileInfo(
            source=one.file.name,
            file=one.file.uri,
            digest=one.digest,
            generation=job.generation,
            num_records=file.num_records,
            num_rejects=sum(file.reject_reasons.values()),
            state=one.state if storage.is_local(one.file.uri) else "",
        )


def _counts(
    job: Job,
    spool: Spool,
    duplicates: Duplicates,
    encoded: Encoded,
    parts: dict[tuple[str, str], PartShards],
) -> list[SourceCounts]:
    """What this generation counts of each of its sources."""
    dropped = duplicates.by_file
    by_source: dict[str, list[FileSpool]] = {source: [] for source in job.sources}
    for file in spool.files:
        by_source[file.source].append(file)
    counts = []
    for source, files in by_source.items():
        reasons: Counter[str] = Counter()
        for file in files:
            reasons.update(file.reject_reasons)
        written = [parts[split, source] for split in SPLITS if (split, source) in parts]
        counts.append(
            SourceCounts(
                source=source,
                num_files=len(files),
                num_records=sum(file.num_records for file in files),
                num_duplicates=sum(dropped[file.number] for file in files),
                num_truncated=sum(part.num_truncated for part in written),
                reject_reasons=dict(sorted(reasons.items())),
                splits={split: encoded.counts[split, source] for split in SPLITS},
                labels={
                    split: dict(sorted(encoded.labels[split, source].items()))
                    for split in SPLITS
                    if encoded.labels[split, source]
                },
                left_out={NO_ANSWER: encoded.unanswered[source]} if encoded.unanswered[source] else {},
            )
        )
    return counts


def move_into_place(job: Job, assembly: Assembly, *, is_new: bool) -> None:
    """Move the files of a generation from the work folder into the dataset, the index behind the shards.

    What a killed preparation of another generation of this number left there is removed before.

    Files of the work folder were written without waiting for the disk; now they must be on it before a manifest is.
    """
    targets = {target for _, target in assembly.moves}
    if is_new:
        gone = remove_unpublished(job.dataset_uri, job.base, targets)
        if gone:
            _LOG.info("%s: removed %d files of a preparation that was killed", job.dataset_uri, len(gone))
    elif job.generation == 0:
        remove_unlisted_tokenizer(job.dataset_uri, targets)
    for source, target in assembly.moves:
        if storage.is_local(job.work_uri):
            with storage.local_path(storage.join(job.work_uri, source)).open("rb") as file:
                os.fsync(file.fileno())
        storage.move_file(storage.join(job.work_uri, source), storage.join(job.dataset_uri, target))


def warnings_of(job: Job, manifest: DatasetManifest) -> list[str]:
    """What somebody who prepared this should know: sources without rows, and documents that were left out."""
    lines = [f"{source}: {why}" for source, why in sources_without_rows(manifest).items() if source in job.sources]
    for reason, count in manifest.left_out.items():
        lines.append(f"{count:,} chats were left out ({reason}={job.config.seq_len}), which hold no label that counts")
    return lines
