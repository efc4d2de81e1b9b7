"""The stages of a preparation: each makes its work items, hands them to the mapper and tells how far it is.

Owns what each stage is given, and the choice of classes and of texts for the tokenizer. The order of the stages is
`prepare`'s, what an item does its own module's.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from data_service import storage
from data_service.chat import messages_of
from data_service.chunks import Chunk, chunk_uri, read_texts
from data_service.config import DataConfig
from data_service.counts import SplitCounts
from data_service.dedupe import Duplicates, find_duplicates, kept_of
from data_service.encode import EncodedChunk, EncodeItem, EncodeSettings, encode_chunk
from data_service.errors import ShardCorruptError, SourceError
from data_service.generations import InputFile, Request
from data_service.hash_files import hashes_file
from data_service.manifest import SPLITS, DatasetManifest, tokenizer_uri
from data_service.mapping import Mapper
from data_service.progress import PrepareProgress, PrepareStage, Report
from data_service.shard_writer import PartItem, PartShards, write_part
from data_service.spool import MAX_CLASSES, Spool
from data_service.tokenizer import TokenizerFiles, TrainingSample, read_tokenizer, train_tokenizer, write_tokenizer
from data_service.work_items import WorkFiles, arrays_of, do_once

__all__ = [
    "Encoded",
    "Job",
    "Sizes",
    "TokenizerPlace",
    "deduplicate",
    "earlier_tokenizer",
    "encode_all",
    "eval_below_of",
    "labels_of",
    "tokenizer_of",
    "write_all",
]


@dataclass(frozen=True)
class Sizes:
    """How much an item takes at a time. The bytes of a dataset do not depend on them, its memory does."""

    chunk_bytes: int = 4 << 20
    """Text of a chunk, the unit of encoding."""
    run_documents: int = 1 << 19
    """Documents whose hashes are sorted together."""
    partition_documents: int = 1 << 19
    """Documents among which duplicates are looked for together, about."""


@dataclass(frozen=True)
class Job:
    """One generation to prepare."""

    request: Request
    files: tuple[InputFile, ...]
    """To read, in order."""
    earlier: tuple[DatasetManifest, ...]
    """Generations before, whole."""
    dataset_uri: str
    work_uri: str
    mapper: Mapper
    report: Report
    sizes: Sizes

    @property
    def config(self) -> DataConfig:
        """The `data` section."""
        return self.request.config

    @property
    def generation(self) -> int:
        """Number of the one to prepare."""
        return len(self.earlier)

    @property
    def base(self) -> DatasetManifest | None:
        """The generation before; it decides on tokenizer, split and classes."""
        return self.earlier[-1] if self.earlier else None

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources with files, in order."""
        return tuple(dict.fromkeys(one.file.name for one in self.files))

    @cached_property
    def loss_masks(self) -> bool:
        """Whether shards tell which tokens count as labels."""
        if self.base is not None:
            return self.base.loss_masks
        return any(source.messages is not None for source in self.config.sources)

    def tell(self, stage: PrepareStage, done: int, total: int, spool: Spool) -> None:
        """Report progress."""
        self.report(PrepareProgress(stage, done, total, spool.num_records, spool.num_rejects))


@dataclass(frozen=True)
class TokenizerPlace:
    """A tokenizer, and where its folder lies."""

    files: TokenizerFiles
    folder_uri: str

    @property
    def token_dtype(self) -> Literal["uint16", "uint32"]:
        """The dtype of a token."""
        return "uint16" if self.files.token_dtype.itemsize == 2 else "uint32"


def deduplicate(job: Job, spool: Spool) -> Duplicates:
    """Find the documents that go; none where data.split.deduplicate is off."""
    if not job.config.split.deduplicate:
        return Duplicates({})

    def tell(share: float) -> None:
        job.tell("deduplicate", int(share * spool.num_bytes), spool.num_bytes, spool)

    tell(0.0)
    hashes = [storage.join(job.dataset_uri, hashes_file(number)) for number in range(job.generation)]
    size = job.sizes.partition_documents
    return find_duplicates(job.work_uri, spool, hashes, job.generation, size, job.mapper, tell)


def eval_below_of(job: Job, spool: Spool) -> int:
    """The hash below which a document is held out: of the first generation, so that the split never moves."""
    return spool.eval_below(job.config.split.eval) if job.base is None else job.base.eval_below


def labels_of(job: Job, spool: Spool) -> tuple[str, ...]:
    """Classes in the order of their numbers: as integers where all are, else by their text.

    Raises:
        SourceError: when a later generation has a class that the first had not.
    """
    found = {label for file in spool.files for label in file.labels}
    if job.base is None:
        if len(found) > MAX_CLASSES:
            raise SourceError(
                f"the label columns of {', '.join(job.sources[:8])} have {len(found):,} values together, at most "
                f"{MAX_CLASSES:,} classes are numbered. Set data.sources…label to columns of classes, or remove it."
            )
        # A label is short (`records.label_of`), and so is the integer that it spells.
        whole = all(label.removeprefix("-").isdecimal() for label in found)
        return tuple(sorted(found, key=lambda label: (int(label) if whole else 0, label)))
    unknown = sorted(found.difference(job.base.labels))
    if unknown:
        raise SourceError(
            f"the files added to {job.dataset_uri} hold the classes {', '.join(map(repr, unknown[:20]))}, the dataset "
            f"was prepared with {', '.join(map(repr, job.base.labels[:20])) or 'none'}. Correct the labels, or prepare "
            "all files into another data.dataset."
        )
    return job.base.labels


def tokenizer_of(job: Job, spool: Spool, duplicates: Duplicates, eval_below: int) -> TokenizerPlace:
    """The tokenizer: that of the dataset, the one named, or one trained on the training part."""
    if job.base is not None:
        return earlier_tokenizer(job, job.base)
    folder_uri = tokenizer_uri(job.work_uri)
    tokenizer = job.request.tokenizer
    if tokenizer is None:
        tokenizer = _trained(job, spool, duplicates, eval_below)
    write_tokenizer(folder_uri, tokenizer)
    return TokenizerPlace(tokenizer, folder_uri)


def earlier_tokenizer(job: Job, base: DatasetManifest) -> TokenizerPlace:
    """The dataset's tokenizer.

    Raises:
        ShardCorruptError: when it is not the one that the manifest names.
    """
    folder_uri = tokenizer_uri(job.dataset_uri)
    tokenizer = read_tokenizer(folder_uri)
    if tokenizer.digest != base.tokenizer_digest:
        raise ShardCorruptError(
            f"{folder_uri} is not the tokenizer that the dataset was prepared with ({tokenizer.digest} instead of "
            f"{base.tokenizer_digest}). Restore it, or delete the folder and prepare the first files again."
        )
    return TokenizerPlace(tokenizer, folder_uri)


def _trained(job: Job, spool: Spool, duplicates: Duplicates, eval_below: int) -> TokenizerFiles:
    train = job.config.tokenizer.to_train
    assert train is not None

    below = _sample_below(job, spool, eval_below, train.max_bytes)

    def texts() -> Iterator[str]:
        return _training_texts(job, spool, duplicates, eval_below, below)

    def work(files: WorkFiles) -> dict[str, object]:
        trained = train_tokenizer(train, texts, job.request.chat_template)
        for name, content in trained.files:
            files.write(f"trained/{name}", content)
        return {}

    do_once(job.work_uri, "trained", work)
    return read_tokenizer(storage.join(job.work_uri, "trained"))


def _sample_below(job: Job, spool: Spool, eval_below: int, max_bytes: int) -> int:
    """The hash behind the last document to train the tokenizer on; 2^64 where all fit. Duplicates weigh in."""
    if spool.num_bytes <= max_bytes:
        return 1 << 64
    sample = TrainingSample(max_bytes)
    for chunk in spool.chunks:
        arrays = arrays_of(chunk_uri(job.work_uri, chunk), ("high", "end"))
        sample.add(arrays["high"], np.diff(arrays["end"], prepend=0))
    return sample.below(eval_below)


def _training_texts(job: Job, spool: Spool, duplicates: Duplicates, eval_below: int, below: int) -> Iterator[str]:
    """Texts of the training part with hashes below a bound, once each."""
    done = 0
    for chunk in spool.chunks:
        job.tell("tokenizer", done, spool.num_bytes, spool)
        done += chunk.num_bytes
        wanted = kept_of(job.work_uri, chunk) if duplicates.touch(chunk) else np.ones(chunk.num_documents, np.bool_)
        high = arrays_of(chunk_uri(job.work_uri, chunk), ("high",))["high"]
        wanted &= high >= np.uint64(eval_below)
        if below < 1 << 64:
            wanted &= high < np.uint64(below)
        found = read_texts(job.work_uri, chunk, wanted)
        if job.files[chunk.file].file.source.messages is None:
            yield from found.texts
        else:
            yield from (message["content"] for text in found.texts for message in messages_of(text))
    job.tell("tokenizer", spool.num_bytes, spool.num_bytes, spool)


@dataclass(frozen=True)
class Encoded:
    """What encoding counted; (split, source) → value."""

    counts: dict[tuple[str, str], SplitCounts]
    labels: dict[tuple[str, str], Counter[str]]
    """Documents of each class."""
    unanswered: Counter[str]
    """Source → chats that are left out, since the answer begins behind the end of their row."""

    @classmethod
    def none(cls, sources: tuple[str, ...]) -> "Encoded":
        """Before the first chunk."""
        keys = [(split, source) for split in SPLITS for source in sources]
        return cls({key: SplitCounts() for key in keys}, {key: Counter() for key in keys}, Counter())

    def add(self, source: str, chunk: EncodedChunk, labels: tuple[str, ...]) -> None:
        """Count a chunk of a source."""
        for split in SPLITS:
            self.counts[split, source] += chunk.counts[split]
            for number, count in chunk.labels[split].items():
                self.labels[split, source][labels[number]] += count
        self.unanswered[source] += chunk.num_unanswered


def encode_all(
    job: Job,
    spool: Spool,
    duplicates: Duplicates,
    tokenizer: TokenizerPlace,
    eval_below: int,
    labels: tuple[str, ...],
) -> Encoded:
    """Encode the chunks."""
    settings = EncodeSettings(
        work_uri=job.work_uri,
        tokenizer_uri=tokenizer.folder_uri,
        tokenizer_digest=tokenizer.files.digest,
        eos_id=tokenizer.files.eos_id,
        token_dtype=tokenizer.token_dtype,
        eval_below=eval_below,
        row_tokens=job.config.seq_len + 1,
    )
    numbers = {label: number for number, label in enumerate(labels)}
    of_files = [tuple(numbers[label] for label in file.labels) if labels else None for file in spool.files]
    items = [
        EncodeItem(
            settings=settings,
            chunk=chunk,
            has_duplicates=duplicates.touch(chunk),
            is_chat=job.files[chunk.file].file.source.messages is not None,
            label_numbers=of_files[chunk.file],
        )
        for chunk in spool.chunks
    ]
    encoded = Encoded.none(job.sources)
    done = 0
    job.tell("encode", 0, spool.num_bytes, spool)
    for one in job.mapper(encode_chunk, items):
        encoded.add(job.files[one.chunk.file].file.name, one, labels)
        done += one.chunk.num_bytes
        job.tell("encode", done, spool.num_bytes, spool)
    _check_answers(job, encoded)
    return encoded


def _check_answers(job: Job, encoded: Encoded) -> None:
    """Raise SourceError when chats were left out and nothing is left to train on."""
    left_out = encoded.unanswered.total()
    if left_out and not any(encoded.counts["train", source].documents for source in job.sources):
        raise SourceError(
            f"data.seq_len={job.config.seq_len}: in {left_out} chats of {', '.join(sorted(+encoded.unanswered))} the "
            "answer begins behind the end of the row, and no other text is left to train on. Raise data.seq_len."
        )


def write_all(job: Job, spool: Spool, encoded: Encoded, labels: tuple[str, ...]) -> dict[tuple[str, str], PartShards]:
    """Write the shards; (split, source) → what was written, parts without documents left out."""
    config = job.config
    row_tokens = 0 if config.rows == "stream" else config.seq_len + 1
    tokens = {key: one.tokens for key, one in encoded.counts.items()}
    configs = {one.file.name: one.file.source for one in job.files}
    chunks: dict[str, list[Chunk]] = {source: [] for source in job.sources}
    for chunk in spool.chunks:
        chunks[job.files[chunk.file].file.name].append(chunk)
    items: dict[tuple[str, str], PartItem] = {}
    for split in SPLITS:
        for number, source in enumerate(job.sources):
            if not tokens[split, source]:
                continue
            has_label = config.rows == "document" and configs[source].label is not None
            items[split, source] = PartItem(
                work_uri=job.work_uri,
                split=split,
                source=number,
                chunks=tuple(chunks[source]),
                rows=config.rows,
                row_tokens=row_tokens,
                shard_tokens=config.shard_tokens,
                shard_rows=max(1, config.shard_tokens // row_tokens) if row_tokens else 0,
                truncate=has_label or configs[source].messages is not None,
                with_answers=job.loss_masks,
                with_labels=bool(labels),
            )
    total, done = sum(tokens.values()), 0
    job.tell("write", 0, total, spool)
    parts: dict[tuple[str, str], PartShards] = {}
    for key, part in zip(items, job.mapper(write_part, list(items.values())), strict=True):
        parts[key] = part
        done += tokens[key]
        job.tell("write", done, total, spool)
    return parts
