"""The first stage of a preparation: all files are read, and somebody tells how far they are.

A file is read by one process, wherever that is. It leaves how much it has read in the work folder, where a thread here
finds it: so a single large file is seen to advance.

Owns what the readers are given, and this watch. What a reader does is `spool`'s.
"""

import json
import threading
from types import TracebackType
from typing import Self

from data_service import storage
from data_service.chat import ChatTemplate
from data_service.errors import ConfigError
from data_service.progress import PrepareProgress
from data_service.spool import (
    ChatCheck,
    FileSpool,
    ReadItem,
    Spool,
    check_spool,
    progress_uri,
    read_file,
    rejects_file,
    write_rejects,
)
from data_service.stages import Job, earlier_tokenizer

__all__ = ["read_all"]

_LOOK_S = 1.0
_LOOK_REMOTE_S = 5.0
_WATCHED = 64
"""Most files that are looked at: those behind the finished ones, in order, which are the ones being read."""
_END_S = 30.0


def read_all(job: Job) -> Spool:
    """Read the files.

    Raises:
        SourceError: when one is bad or has changed, or too many records are bad.
        DataUnavailableError: when one cannot be read now.
        ConfigError: when chats are added to a dataset without.
    """
    has_chats = any(one.file.source.messages is not None for one in job.files)
    if has_chats and not job.loss_masks:
        raise ConfigError(
            f"chats were to be added to {job.dataset_uri}, whose shards do not tell which tokens count as labels. "
            "Choose another data.dataset for a dataset with chats."
        )
    chat = _chat_check(job) if has_chats else None
    config = job.config
    items = [
        ReadItem(
            work_uri=job.work_uri,
            number=number,
            file=one.file,
            state=one.state,
            named=one.named,
            max_record_bytes=config.rejects.max_record_bytes,
            chunk_bytes=job.sizes.chunk_bytes,
            run_documents=job.sizes.run_documents,
            with_runs=config.split.deduplicate,
            with_labels=config.rows == "document" and one.file.source.label is not None,
            chat=chat if one.file.source.messages is not None else None,
        )
        for number, one in enumerate(job.files)
    ]
    files: list[FileSpool] = []
    done, total = 0, sum(one.num_bytes for one in job.files)
    records = rejects = 0
    job.report(PrepareProgress("read", 0, total, 0, 0))
    with _Watch(job) as watch:
        for one, file in zip(job.files, job.mapper(read_file, items), strict=True):
            files.append(file)
            done += one.num_bytes
            records += file.num_records
            rejects += sum(file.reject_reasons.values())
            watch.finished(PrepareProgress("read", done, total, records, rejects), len(files))
    spool = Spool(tuple(files))
    write_rejects(job.work_uri, spool, job.generation)
    rejects_uri = storage.join(job.dataset_uri, rejects_file(job.generation))
    check_spool(config, spool, [one.file.uri for one in job.files], rejects_uri)
    return spool


def _chat_check(job: Job) -> ChatCheck:
    """What chats must fit, before there is a tokenizer where one is to be trained."""
    tokenizer = job.request.tokenizer if job.base is None else earlier_tokenizer(job, job.base).files
    if tokenizer is not None:
        ChatTemplate.of(tokenizer)
        specials = tuple(sorted(tokenizer.special_tokens.items()))
        return ChatCheck(tokenizer.chat_template or "", specials, tokenizer.control_tokens)
    if job.request.chat_template is None:
        raise ConfigError(
            "data.sources…messages was set, and a tokenizer is to be trained, which has no chat template of its own. "
            "Set data.chat_template to a Jinja file, or data.tokenizer.path to the tokenizer of a chat model."
        )
    ChatTemplate.to_train(job.request.chat_template)
    return ChatCheck(job.request.chat_template, None, ())


class _Watch:
    """Looks how far the files are that are being read, and reports it with what is finished."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._wait_s = _LOOK_S if storage.is_local(job.work_uri) else _LOOK_REMOTE_S
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-readers", daemon=True)
        self._finished = PrepareProgress("read", 0, sum(one.num_bytes for one in job.files), 0, 0)
        self._next = 0
        self._told = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_END_S)

    def finished(self, progress: PrepareProgress, num_files: int) -> None:
        """Another file is finished, the first `num_files` are."""
        with self._lock:
            self._finished, self._next = progress, num_files
            self._told = max(self._told, progress.done)
            self._job.report(progress)

    def _run(self) -> None:
        while not self._stop.wait(self._wait_s):
            first = self._next
            found = [self._look(number) for number in range(first, min(first + _WATCHED, len(self._job.files)))]
            with self._lock:
                if first != self._next:
                    continue
                before = self._finished
                done, records, rejects = (sum(parts) for parts in zip(*found, strict=True)) if found else (0, 0, 0)
                now = before.done + done
                if now > self._told and not self._stop.is_set():
                    self._told = now
                    self._job.report(
                        PrepareProgress(
                            "read", now, before.total, before.num_records + records, before.num_rejects + rejects
                        )
                    )

    def _look(self, number: int) -> tuple[int, int, int]:
        """Bytes, records and rejects of a file so far."""
        try:
            done, records, rejects = json.loads(storage.read_bytes(progress_uri(self._job.work_uri, number)))
            return min(int(done), self._job.files[number].num_bytes), int(records), int(rejects)
        except (OSError, ValueError, ConfigError):
            return 0, 0, 0  # not begun, or being written
