"""Append-only JSON lines in a run's folder, on a disk or an object store.

On a disk a journal is `NAME.jsonl`, flushed and fsynced after each append. An object store cannot append: there a
journal is a folder `NAME.jsonl/` of numbered segments, each written once. `read_journal` hides which. Only the
controller writes.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_service import storage

__all__ = ["FileJournal", "Journal", "SegmentJournal", "open_journal", "read_journal"]

_SEGMENT_LINES = 50


class Journal:
    """One journal, opened for appending."""

    def append(self, record: dict[str, Any]) -> None:
        """Add a line. On a disk it is durable when this returns; on an object store after `flush`."""
        raise AssertionError("a journal is a FileJournal or a SegmentJournal")

    def rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Drop the lines for which `keep` is false, atomically; returns the dropped ones."""
        raise AssertionError("a journal is a FileJournal or a SegmentJournal")

    def flush(self) -> None:
        """Make all appended lines durable."""

    def close(self) -> None:
        """Flush and release the file."""
        self.flush()


class FileJournal(Journal):
    """A journal on a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """See Journal."""
        self._file.write(_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """See Journal."""
        records = read_journal(str(self._path))
        dropped = [record for record in records if not keep(record)]
        if dropped:
            fresh = self._path.with_suffix(".rewrite")
            with fresh.open("w", encoding="utf-8") as file:
                file.writelines(_line(record) for record in records if keep(record))
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            fresh.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        return dropped

    def close(self) -> None:
        """See Journal."""
        self._file.close()


class SegmentJournal(Journal):
    """A journal on an object store: lines are held until a segment is full or `flush` is called."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        names = _segments(uri)
        self._next = int(names[-1].removesuffix(".jsonl")) + 1 if names else 0
        self._held: list[str] = []

    def append(self, record: dict[str, Any]) -> None:
        """See Journal."""
        self._held.append(_line(record))
        if len(self._held) >= _SEGMENT_LINES:
            self.flush()

    def flush(self) -> None:
        """See Journal."""
        if self._held:
            storage.write_bytes(f"{self._uri}/{self._next:08d}.jsonl", "".join(self._held).encode())
            self._next += 1
            self._held = []

    def rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """See Journal. Segments are replaced one by one, so that a crash in between leaves each one whole."""
        self.flush()
        dropped: list[dict[str, Any]] = []
        for name in _segments(self._uri):
            records = _parse(storage.read_bytes(f"{self._uri}/{name}").decode().splitlines())
            kept = [record for record in records if keep(record)]
            if len(kept) < len(records):
                dropped.extend(record for record in records if not keep(record))
                storage.write_bytes(f"{self._uri}/{name}", "".join(map(_line, kept)).encode())
        return dropped


def open_journal(uri: str) -> Journal:
    """A journal at `uri` (a path or an object-store URI ending in `.jsonl`)."""
    return FileJournal(Path(uri)) if storage.is_local(uri) else SegmentJournal(uri)


def read_journal(uri: str) -> list[dict[str, Any]]:
    """All whole lines of a journal, in order; empty when there is none. A torn last line is left out."""
    if storage.is_local(uri):
        path = Path(uri)
        if not path.exists():
            return []
        return _parse(path.read_text(encoding="utf-8", errors="replace").splitlines())
    lines: list[str] = []
    for name in _segments(uri):
        lines.extend(storage.read_bytes(f"{uri}/{name}").decode().splitlines())
    return _parse(lines)


def _segments(uri: str) -> list[str]:
    return sorted(name for name in storage.list_names(uri) if name.endswith(".jsonl"))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def _parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # a line torn by a crash of the writer: it was never acknowledged
    return records


def _cut_torn_line(path: Path) -> None:
    """Drop the bytes after the last newline, so that the next append starts a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
