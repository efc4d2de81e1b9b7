"""What is asked for, and which generation of a dataset it is: found, to be added, or another dataset.

    data section + files' content ─ look_at ─▶ Request ─ find_target ─▶ an existing manifest │ new files │ ConfigError

A request is a set of settings and of files; paths and the order of files do not count, names of sources and the content
of files do. The dataset that a request asks for is the generation with just these settings and files. Files that were
added since the newest generation become another one; nothing else may differ.

Owns this comparison and the prepare key. Changes nothing.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

from data_service import storage
from data_service.chat import read_chat_template
from data_service.config import DataConfig, SourceConfig
from data_service.errors import ConfigError
from data_service.manifest import DATASET_VERSION, DatasetManifest
from data_service.progress import PrepareProgress, Report
from data_service.source_files import SourceFile, check_unchanged, find_files, fingerprint, source_state
from data_service.spool import check_rejects, rejects_file
from data_service.tokenizer import TokenizerFiles, read_tokenizer

__all__ = ["InputFile", "Known", "Request", "Target", "files_of", "find_target", "known_files", "look_at"]

_LOOKS = 16
"""Files that are looked at together; reading them waits for disks and stores."""
_TELL_S = 0.5
_SOURCE_KEY = "source "


@dataclass(frozen=True)
class InputFile:
    """A source file, and what is in it."""

    file: SourceFile
    digest: str
    """Format, compression and BLAKE2b-128 of the content."""
    num_bytes: int
    state: str
    """Of `source_state`, when it was looked at."""
    named: str
    """Its URI, or the one under which an earlier preparation read it."""

    @property
    def identity(self) -> tuple[str, str]:
        """(source, digest): all that makes it the same file."""
        return self.file.name, self.digest


@dataclass(frozen=True)
class Request:
    """A dataset that is asked for."""

    config: DataConfig
    files: tuple[InputFile, ...]
    """In the order of data.sources."""
    tokenizer: TokenizerFiles | None
    """The one that is read; None to train one."""
    chat_template: str | None
    """What data.chat_template holds, where there are chats."""
    settings: dict[str, str]
    """All but the files that the content depends on, by name."""

    @cached_property
    def key(self) -> str:
        """The prepare key: equal for requests that ask for the same dataset."""
        files = sorted(one.identity for one in self.files)
        text = json.dumps({"settings": self.settings, "files": files}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def common_settings(self) -> dict[str, str]:
        """Those that are not of one source."""
        return {name: value for name, value in self.settings.items() if not name.startswith(_SOURCE_KEY)}

    def columns_of(self, file: InputFile) -> str:
        """The settings of a file's source."""
        return self.settings[_source_setting(file.file.name)]


@dataclass(frozen=True)
class Target:
    """What a request comes to in a folder."""

    generations: tuple[DatasetManifest, ...]
    """Those that must be whole: up to the one asked for, or all there are, which a new one is added to."""
    manifest: DatasetManifest | None
    """The generation asked for; None where it is to be prepared."""
    new_files: tuple[InputFile, ...]
    """Files to be prepared, in order."""


Known = Mapping[tuple[str, str], str]
"""(URI, state of a file on this machine) → digest that its content had then."""


def known_files(manifests: Sequence[DatasetManifest]) -> Known:
    """Files that a dataset was prepared from, as they were."""
    return {(one.file, one.state): one.digest for one in (manifests[-1].files if manifests else ()) if one.state}


def look_at(config: DataConfig, known: Known, report: Report) -> Request:
    """Look at the sources and the tokenizer.

    Args:
        config: the `data` section.
        known: files that are not read again as long as they are in this state.
        report: told of the bytes of the others.

    Raises:
        SourceError: when a source names no file, or one cannot be read.
        DataUnavailableError: when one cannot be read now.
        ConfigError: when the tokenizer or the chat template cannot be used.
    """
    files = find_files(config.sources)
    with ThreadPoolExecutor(_LOOKS, "look") as pool:
        seen = list(pool.map(_state_and_size, files))
        unknown = [
            (file, size)
            for file, (state, size) in zip(files, seen, strict=True)
            if storage.is_local(file.uri) and not _known_digest(file, state, known)
        ]
        progress = _Looking(report, sum(size for _, size in unknown))

        def look(one: tuple[SourceFile, tuple[str, int]]) -> InputFile:
            file, (state, size) = one
            digest = _known_digest(file, state, known)
            if digest is None:
                digest = f"{_kind(file)}:{fingerprint(file.uri, lambda done: progress.tell(file.uri, done))}"
                check_unchanged(file.uri, state)
            return InputFile(file, digest, size, state, file.uri)

        inputs = tuple(pool.map(look, zip(files, seen, strict=True)))
        progress.end()
    has_chats = any(source.messages is not None for source in config.sources)
    template = read_chat_template(config.chat_template) if has_chats and config.chat_template is not None else None
    tokenizer = None if config.tokenizer.path is None else read_tokenizer(config.tokenizer.path)
    if tokenizer is not None and template is not None:
        tokenizer = tokenizer.with_chat_template(template)
    return Request(config, inputs, tokenizer, template, _settings(config, tokenizer, template))


def _state_and_size(file: SourceFile) -> tuple[str, int]:
    state = source_state(file.uri)
    return state, int(state.partition("/")[0])


def _kind(file: SourceFile) -> str:
    return file.format if file.compression == "none" else f"{file.format}.{file.compression}"


def _known_digest(file: SourceFile, state: str, known: Known) -> str | None:
    found = known.get((file.uri, state))
    return found if found is not None and found.startswith(f"{_kind(file)}:") else None


class _Looking:
    """Adds up what the threads have hashed, and reports it now and then."""

    def __init__(self, report: Report, total: int) -> None:
        self._report = report
        self._total = total
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()
        self._told_at = time.monotonic()

    def tell(self, uri: str, done: int) -> None:
        with self._lock:
            self._done[uri] = done
            if time.monotonic() - self._told_at >= _TELL_S and self._total:
                self._told_at = time.monotonic()
                done_here = min(self._total, sum(self._done.values()))
                self._report(PrepareProgress("look", done_here, self._total, 0, 0))

    def end(self) -> None:
        if self._total:
            self._report(PrepareProgress("look", self._total, self._total, 0, 0))


def _settings(config: DataConfig, tokenizer: TokenizerFiles | None, template: str | None) -> dict[str, str]:
    settings = {
        "format": str(DATASET_VERSION),
        "data.rows": config.rows,
        "data.split.eval": repr(config.split.eval),
        "data.split.deduplicate": repr(config.split.deduplicate),
        "data.rejects.max_record_bytes": repr(config.rejects.max_record_bytes),
        "data.shard_tokens": repr(config.shard_tokens),
    }
    if config.rows != "stream":
        settings["data.seq_len"] = repr(config.seq_len)
    if template is not None:
        settings["data.chat_template (content)"] = hashlib.blake2b(template.encode(), digest_size=16).hexdigest()
    if tokenizer is not None:
        settings["data.tokenizer.path (content)"] = tokenizer.digest
    elif (train := config.tokenizer.to_train) is not None:
        for name, value in train.model_dump().items():
            settings[f"data.tokenizer.train.{name}"] = str(value)
    for name, source in zip(config.source_names, config.sources, strict=True):
        settings[_source_setting(name)] = _columns(source)
    return settings


def _source_setting(name: str) -> str:
    return f"{_SOURCE_KEY}{name!r} (text, messages, label)"


def _columns(source: SourceConfig) -> str:
    return f"{source.text!r}, {source.messages!r}, {source.label!r}"


def find_target(request: Request, manifests: Sequence[DatasetManifest], dataset_uri: str) -> Target:
    """What the request comes to in a folder with these generations.

    Raises:
        ConfigError: when they are of another dataset, naming what differs.
        SourceError: when the one asked for left out more records than the configuration now allows.
    """
    if not manifests:
        return Target((), None, request.files)
    for manifest in reversed(manifests):
        if manifest.prepare_key == request.key:
            check_rejects(
                request.config.rejects.max_fraction,
                manifest.num_records,
                manifest.reject_reasons,
                storage.join(dataset_uri, rejects_file(manifest.generation)),
            )
            return Target(tuple(manifests[: manifest.generation + 1]), manifest, ())
    newest = manifests[-1]
    differences = _differences(request, newest)
    if differences:
        raise ConfigError(
            f"{dataset_uri} holds a dataset that was made of something else: {'; '.join(differences[:8])}. Nothing was "
            "changed. Restore the setting or the file, or choose another data.dataset or run.name; only files may be "
            "added to a dataset."
        )
    known = Counter((file.source, file.digest) for file in newest.files)
    new_files = []
    for one in request.files:
        if known[one.identity]:
            known[one.identity] -= 1
        else:
            new_files.append(one)
    return Target(tuple(manifests), None, tuple(new_files))


def _differences(request: Request, manifest: DatasetManifest) -> list[str]:
    """What keeps the request from being the dataset with files added."""
    there, here = manifest.inputs, request.settings
    found = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name) and (name in there or not name.startswith(_SOURCE_KEY))
    ]
    wanted = Counter(one.identity for one in request.files)
    for number, file in enumerate(manifest.files):
        if wanted[file.source, file.digest]:
            wanted[file.source, file.digest] -= 1
        else:
            found.append(
                f"source file {number} (content) of {file.source!r} is {file.digest} ({file.file}) there and no file "
                "here is"
            )
    return found


def files_of(request: Request, manifest: DatasetManifest, generation: int) -> tuple[InputFile, ...]:
    """The files of the request that a generation was prepared from, in its order."""
    by_identity: dict[tuple[str, str], list[InputFile]] = {}
    for one in request.files:
        by_identity.setdefault(one.identity, []).append(one)
    return tuple(
        replace(by_identity[file.source, file.digest].pop(0), named=file.file)
        for file in manifest.files
        if file.generation == generation
    )
