"""Reading: one work item per source file, from records to chunks of text with their hashes.

    source file ─ readers ─▶ read/NNNNN/chunk-*.arrow    about 4 MiB of text each: text, hash, label
                       ├───▶ read/NNNNN/run-*.bin        sorted hashes of half a million documents each, with places
                       └───▶ read/NNNNN/rejects-*.jsonl  file, line, reason

Memory holds one chunk of text and the hashes of one run, however long the file is. Duplicates are still in.

Owns what is in the work folder under `read/`, and the limit on rejects.
"""

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from data_service import storage
from data_service.chat import ChatError, ChatTemplate, messages_of
from data_service.chunks import Chunk
from data_service.config import DataConfig
from data_service.errors import SourceError
from data_service.hash_files import PLACED_HASH, encode_hashes
from data_service.readers import SourceFile, read_records
from data_service.records import Reject
from data_service.source_files import check_unchanged
from data_service.work_items import Result, WorkFiles, arrays_to_bytes, do_once, write_quickly

__all__ = [
    "MAX_CLASSES",
    "ChatCheck",
    "FileSpool",
    "ReadItem",
    "Spool",
    "check_rejects",
    "check_spool",
    "progress_uri",
    "read_file",
    "rejects_file",
    "run_uri",
    "write_rejects",
]

MAX_CLASSES = 65_536
_HASH_RANGE = 2**64
_REJECTS_OF_A_FILE = 10_000
_TELL_S = 1.0
_TELL_REMOTE_S = 5.0


@dataclass(frozen=True)
class ReadItem:
    """One source file to read."""

    work_uri: str
    number: int
    """Place of the file in the preparation."""
    file: SourceFile
    state: str
    """Of `source_state`: in another one its content is not what was asked for."""
    named: str
    """What rejects call it."""
    max_record_bytes: int
    chunk_bytes: int
    run_documents: int
    with_runs: bool
    """Whether hashes are kept for the search for duplicates."""
    with_labels: bool
    chat: "ChatCheck | None"
    """The template that chats of the file must fit."""


@dataclass(frozen=True)
class ChatCheck:
    """What a chat template is made of, small and without the tokenizer."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] | None
    """None where the tokenizer is yet to be trained."""
    control_tokens: tuple[str, ...]

    def template(self) -> ChatTemplate:
        """The template."""
        if self.special_tokens is None:
            return ChatTemplate.to_train(self.source)
        return ChatTemplate(self.source, dict(self.special_tokens), self.control_tokens)


@dataclass(frozen=True)
class FileSpool:
    """What reading one file left behind."""

    number: int
    source: str
    num_records: int
    reject_reasons: Mapping[str, int]
    chunks: tuple[Chunk, ...]
    runs: tuple[int, ...]
    """Documents of each run."""
    smallest: int
    """Least hash (first 8 bytes) of a document; 2^64 without any."""
    largest: int
    """-1 without any."""
    labels: tuple[str, ...]
    """Classes in the order in which they came; a chunk's labels are places in it."""
    num_reject_files: int

    @property
    def num_documents(self) -> int:
        """Documents, duplicates included."""
        return sum(chunk.num_documents for chunk in self.chunks)


@dataclass(frozen=True)
class Spool:
    """What reading all files left behind."""

    files: tuple[FileSpool, ...]

    @cached_property
    def num_records(self) -> int:
        """Records, good and bad."""
        return sum(file.num_records for file in self.files)

    @cached_property
    def reject_reasons(self) -> dict[str, int]:
        """Kind of reason → records left out."""
        total: Counter[str] = Counter()
        for file in self.files:
            total.update(file.reject_reasons)
        return dict(sorted(total.items()))

    @cached_property
    def num_rejects(self) -> int:
        """Records left out."""
        return sum(self.reject_reasons.values())

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, in global order."""
        return tuple(chunk for file in self.files for chunk in file.chunks)

    @cached_property
    def num_documents(self) -> int:
        """Documents, duplicates included."""
        return sum(file.num_documents for file in self.files)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return sum(chunk.num_bytes for chunk in self.chunks)

    def eval_below(self, share: float) -> int:
        """The hash below which a document is held out.

        A small corpus may have no document below `share`, or all: then the one with the smallest hash is held out, or
        the one with the largest is kept, so that both parts have at least one.

        Raises:
            SourceError: when there is one distinct document, which cannot be on both sides.
        """
        smallest = min(file.smallest for file in self.files)
        largest = max(file.largest for file in self.files)
        if share == 0.0:
            return 0
        if smallest == largest:
            raise SourceError(
                f"data.split.eval={share}: the sources hold one distinct document, which cannot be both trained on and "
                "held out. Add text, or set data.split.eval=0."
            )
        return min(max(int(share * _HASH_RANGE), smallest + 1), largest)


def rejects_file(generation: int) -> str:
    """Path of a generation's rejects inside its dataset."""
    return "rejects.jsonl" if generation == 0 else f"rejects.{generation:05d}.jsonl"


def run_uri(work_uri: str, file: int, run: int) -> str:
    """Where the hashes of a run lie."""
    return storage.join(work_uri, f"read/{file:05d}/run-{run:05d}.bin")


def progress_uri(work_uri: str, file: int) -> str:
    """Where the reader of a file tells how far it is: bytes, records, rejects."""
    return storage.join(work_uri, f"read/{file:05d}.progress")


def check_rejects(max_fraction: float, num_records: int, reasons: Mapping[str, int], rejects_uri: str) -> None:
    """Raise SourceError when more than `data.rejects.max_fraction` of the records were left out."""
    num_rejects = sum(reasons.values())
    if num_rejects > max_fraction * num_records:
        causes = ", ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items()))
        raise SourceError(
            f"data.rejects.max_fraction={max_fraction}: {num_rejects} of {num_records} records are bad ({causes}); "
            f"{rejects_uri} names file, line and reason of each. Repair the source or raise the limit."
        )


def write_rejects(work_uri: str, spool: Spool, generation: int) -> None:
    """Join the rejects of all files, in order, to `rejects_file(generation)` in the work folder."""
    with storage.publish(storage.join(work_uri, rejects_file(generation))) as target:
        for file in spool.files:
            for part in range(file.num_reject_files):
                name = f"read/{file.number:05d}/rejects-{part:05d}.jsonl"
                target.write(storage.read_bytes(storage.join(work_uri, name)))


def check_spool(config: DataConfig, spool: Spool, uris: list[str], rejects_uri: str) -> None:
    """Raise SourceError when too many records were left out, or all."""
    check_rejects(config.rejects.max_fraction, spool.num_records, spool.reject_reasons, rejects_uri)
    if not spool.num_documents:
        raise SourceError(
            f"{', '.join(uris[:5])}: {spool.num_records} records were read and none holds text. "
            "Add text, or name another column in data.sources."
        )


def read_file(item: ReadItem) -> FileSpool:
    """Read one file into the work folder."""
    result = do_once(item.work_uri, f"read/{item.number:05d}", lambda files: _Reading(item, files).run())
    chunks = enumerate(result["chunks"])
    return FileSpool(
        number=item.number,
        source=item.file.name,
        num_records=result["num_records"],
        reject_reasons=result["reject_reasons"],
        chunks=tuple(Chunk(item.number, number, *values) for number, values in chunks),
        runs=tuple(result["runs"]),
        smallest=result["smallest"],
        largest=result["largest"],
        labels=tuple(result["labels"]),
        num_reject_files=result["num_reject_files"],
    )


@dataclass
class _Reading:
    """One file being read."""

    item: ReadItem
    files: WorkFiles
    texts: list[bytes] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    run_hashes: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    run_size: int = 0
    chunks: list[tuple[int, int, int, int]] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    smallest: int = _HASH_RANGE
    largest: int = -1
    rejects: list[str] = field(default_factory=list)
    num_reject_files: int = 0
    num_records: int = 0
    num_rejects: int = 0
    told_at: float = 0.0

    def run(self) -> Result:
        """Read to the end."""
        item = self.item
        chat = None if item.chat is None else item.chat.template()
        reasons: Counter[str] = Counter()
        size = 0
        texts, digests = self.texts, self.digests
        check_unchanged(item.file.uri, item.state)
        self._tell(0)
        for record in read_records(item.file, item.max_record_bytes, self._tell):
            self.num_records += 1
            reject = record if isinstance(record, Reject) else None
            if chat is not None and not isinstance(record, Reject):
                try:
                    chat.render(messages_of(record.text))
                except ChatError as error:
                    reject = Reject(record.line, str(error))
            if reject is not None:
                reasons[reject.reason.partition(":")[0]] += 1
                self.num_rejects += 1
                line = {"file": item.named, "line": reject.line, "reason": reject.reason}
                self.rejects.append(json.dumps(line, ensure_ascii=False) + "\n")
                if len(self.rejects) >= _REJECTS_OF_A_FILE:
                    self._end_rejects()
                continue
            assert not isinstance(record, Reject)
            data = record.text.encode()
            texts.append(data)
            digests.append(hashlib.blake2b(data, digest_size=16).digest())
            if item.with_labels:
                self.classes.append(self._class_of(record.label))
            size += len(data)
            if size >= item.chunk_bytes:
                self._end_chunk(size)
                size = 0
        check_unchanged(item.file.uri, item.state)
        self._end_chunk(size)
        self._end_run()
        self._end_rejects()
        return {
            "num_records": self.num_records,
            "reject_reasons": dict(reasons),
            "chunks": self.chunks,
            "runs": self.runs,
            "smallest": self.smallest,
            "largest": self.largest,
            "labels": list(self.labels),
            "num_reject_files": self.num_reject_files,
        }

    def _tell(self, done: int) -> None:
        """Leave word of how much was read, now and then."""
        now = time.monotonic()
        if not done or now - self.told_at >= (_TELL_S if storage.is_local(self.item.work_uri) else _TELL_REMOTE_S):
            self.told_at = now
            word = json.dumps([done, self.num_records, self.num_rejects]).encode()
            with contextlib.suppress(OSError):  # what matters fails at the next write
                write_quickly(progress_uri(self.item.work_uri, self.item.number), word)

    def _end_rejects(self) -> None:
        if self.rejects:
            name = f"read/{self.item.number:05d}/rejects-{self.num_reject_files:05d}.jsonl"
            self.files.write(name, "".join(self.rejects).encode())
            self.num_reject_files += 1
            self.rejects.clear()

    def _class_of(self, label: str | None) -> int:
        if label is None:
            return -1
        if label not in self.labels and len(self.labels) >= MAX_CLASSES:
            raise SourceError(
                f"{self.item.file.uri}: the label column {self.item.file.source.label!r} has more than {MAX_CLASSES:,} "
                f"values, at last {label[:100]!r}. Set data.sources…label to a column of classes, or remove it."
            )
        return self.labels.setdefault(label, len(self.labels))

    def _end_chunk(self, size: int) -> None:
        """Write what was collected."""
        if not self.texts:
            return
        hashes = np.frombuffer(b"".join(self.digests), "<u8").reshape(-1, 2)
        ends = np.cumsum([len(text) for text in self.texts])
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "text": np.frombuffer(b"".join(self.texts), np.uint8),
            "end": ends.astype(np.int64),
            "high": np.ascontiguousarray(hashes[:, 0]),
        }
        if self.item.with_labels:
            arrays["label"] = np.array(self.classes, dtype=np.int32)
        self.files.write(f"read/{self.item.number:05d}/chunk-{len(self.chunks):06d}.arrow", arrays_to_bytes(arrays))
        self.chunks.append((len(self.runs), self.run_size, len(self.texts), size))
        self.smallest = min(self.smallest, int(hashes[:, 0].min()))
        self.largest = max(self.largest, int(hashes[:, 0].max()))
        if self.item.with_runs:
            self.run_hashes.append(hashes)
        self.run_size += len(self.texts)
        self.texts.clear()
        self.digests.clear()
        self.classes.clear()
        if self.run_size >= self.item.run_documents:
            self._end_run()

    def _end_run(self) -> None:
        """Sort the hashes of the chunks since the last run."""
        if not self.run_size:
            return
        if self.item.with_runs:
            hashes = np.concatenate(self.run_hashes)
            order = np.lexsort((hashes[:, 1], hashes[:, 0]))
            records = np.empty(order.size, dtype=PLACED_HASH)
            records["high"], records["low"], records["place"] = hashes[order, 0], hashes[order, 1], order
            name = f"read/{self.item.number:05d}/run-{len(self.runs):05d}.bin"
            self.files.write(name, encode_hashes(records))
        self.runs.append(self.run_size)
        self.run_hashes.clear()
        self.run_size = 0
