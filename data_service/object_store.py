"""Remote stores: which one a URI means, and requests to it that end.

Owns the filesystems of fsspec and their options, the run's S3 settings, retries, deadlines, and reads that are never
shorter than what was asked for. One layer retries, this one: what botocore and s3fs would add to it is switched off, or
kept to two attempts where one call makes many requests. A request without an answer for 15 s has failed, and no attempt
begins later than a minute after the first.

Filesystems are created on first use in the process that uses them, never inherited over a fork.
"""

import asyncio
import functools
import json
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from data_service.errors import ConfigError

__all__ = [
    "Piece",
    "ReplacedError",
    "call",
    "configure_s3",
    "deadline_s",
    "fetch",
    "filesystem",
    "is_s3",
    "retry",
    "s3_environment",
    "s3_variables",
]

_LOG = logging.getLogger(__name__)

_S3_VARIABLE = "STORMJIB_S3"
"""The run's S3 settings for the processes below this one. They hold no secret."""
_ATTEMPTS = 5
_ATTEMPTS_WHEN_SLOWED = 8
"""A store that asks to be asked less often is given more time."""
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 8.0
_GIVE_UP_S = 60.0
_CONNECT_S = 5.0
_SILENT_S = 15.0
"""Longest silence of a store that is asked for something small, or that is sending."""
_SILENT_TRANSFER_S = 60.0
"""Longest silence of a store that copies or takes a file."""
_REQUEST_S = 30.0
_SLOWEST_BYTES_PER_S = 256 * 2**10
"""A transfer that is slower than this on the whole has failed, however steadily it drips."""
_BODY_PART = 1 << 20

_PASSING_STATUS = (408, 409, 429, 500, 502, 503, 504)
_PASSING_CODES = ("SlowDown", "RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
_SLOWING = ("SlowDown", "ServiceUnavailable", "TooManyRequests", "429", "503")
_PASSING_KINDS = (
    "ConnectionError",  # botocore: no connection
    "HTTPClientError",  # botocore: no answer in time, connection closed
    "IncompleteReadError",
    "ResponseStreamingError",
    "FlexibleChecksumError",
    "ResponseParserError",
    "ClientError",  # aiohttp's root; botocore's of the same name is told by its response
)
_OTHER_REGION = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "301")

ResultT = TypeVar("ResultT")


class _ShortBodyError(OSError):
    """Fewer bytes came than were asked for."""


class ReplacedError(OSError):
    """Another file has the name by now."""


_NOT_WORTH_RETRYING = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ReplacedError,
)


def configure_s3(endpoint_url: str | None = None, region: str | None = None, profile: str | None = None) -> None:
    """Set how `s3://` is reached from this process and all it starts from now on; None leaves it to the environment.

    Secrets are no part of it: they come from the AWS variables or from the profile.
    """
    os.environ.pop(_S3_VARIABLE, None)
    os.environ.update(s3_variables(endpoint_url, region, profile))


def s3_variables(endpoint_url: str | None, region: str | None, profile: str | None) -> dict[str, str]:
    """The environment of a process for which `configure_s3` is called with these; empty where all are None."""
    given = {"endpoint_url": endpoint_url, "region": region, "profile": profile}
    settings = {name: value for name, value in given.items() if value is not None}
    return {_S3_VARIABLE: json.dumps(settings, sort_keys=True)} if settings else {}


def s3_environment() -> dict[str, str]:
    """What hands `configure_s3` to a process that does not inherit this one's environment."""
    return {_S3_VARIABLE: os.environ[_S3_VARIABLE]} if _S3_VARIABLE in os.environ else {}


def is_s3(uri: str) -> bool:
    """Whether the URI names an object on S3."""
    return uri.startswith(("s3://", "s3a://"))


@functools.lru_cache(maxsize=16)
def _s3_options(settings: str, purpose: str) -> dict[str, Any]:
    """Arguments of an S3FileSystem."""
    import fsspec.config

    chosen = json.loads(settings) if settings else {}
    users = fsspec.config.conf.get("s3", {})
    options: dict[str, Any] = {
        "use_listings_cache": False,  # listings from before say nothing about other writers
        "config_kwargs": {
            **users.get("config_kwargs", {}),
            "connect_timeout": _CONNECT_S,
            "read_timeout": _SILENT_S if purpose == "request" else _SILENT_TRANSFER_S,
            "retries": {"mode": "standard", "total_max_attempts": 1 if purpose == "request" else 2},
            "max_pool_connections": 32,
        },
    }
    for name in ("endpoint_url", "profile"):
        if name in chosen:
            options[name] = chosen[name]
    if "region" in chosen:
        options["client_kwargs"] = {**users.get("client_kwargs", {}), "region_name": chosen["region"]}
    return options


def filesystem(uri: str, purpose: Literal["request", "transfer"] = "request") -> tuple[Any, str]:
    """The fsspec filesystem of a remote URI, and the path in it.

    Args:
        uri: of a file or folder.
        purpose: `request` for calls that make one request, `transfer` for those that make many or move files.

    Raises:
        ConfigError: when no store of that kind is known.
    """
    import fsspec

    options = _s3_options(os.environ.get(_S3_VARIABLE, ""), purpose) if is_s3(uri) else {}
    try:
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except (ValueError, ImportError) as cause:
        raise ConfigError(f"{uri}: {str(cause).rstrip('.')}. Use a folder or an s3:// URI.") from cause
    if is_s3(uri):
        fs.retries = 1
    return fs, cast(str, path)


def call(fs: Any, method: str, *arguments: Any, num_bytes: int = 0, **named: Any) -> Any:
    """Call a method of a filesystem, with a deadline where it knows one.

    Args:
        fs: as `filesystem` gave it.
        method: its name.
        *arguments: passed on.
        num_bytes: how much it moves.
        **named: passed on.
    """
    if getattr(fs, "async_impl", False):
        named["timeout"] = deadline_s(num_bytes)
    return getattr(fs, method)(*arguments, **named)


def deadline_s(num_bytes: int) -> float:
    """How long one request may take that moves so many bytes."""
    return _REQUEST_S + num_bytes / _SLOWEST_BYTES_PER_S


def _response(error: BaseException) -> dict[str, Any]:
    """What an S3 server answered, where an error says."""
    for one in (error, error.__cause__):
        found = getattr(one, "response", None)
        if isinstance(found, dict):
            return found
    return {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _is_library(error: BaseException) -> bool:
    """Whether an error comes from the libraries under s3fs, which raise their own kinds when no answer came at all."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")


def _may_pass(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, _NOT_WORTH_RETRYING):
        return False
    response = _response(error)
    if response:
        return (
            response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _PASSING_STATUS
            or _code(error) in _PASSING_CODES
        )
    if _is_library(error):
        return any(kind.__name__ in _PASSING_KINDS for kind in type(error).__mro__)
    return isinstance(error, OSError)


def _refusal(what: str, error: BaseException) -> ConfigError | None:
    """The message for an error that the user has to mend: credentials, permission, bucket, region, profile."""
    kind = type(error).__name__
    if "Credentials" in kind or "Token" in kind or isinstance(error, PermissionError):
        fix = (
            "Set credentials that may do this, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a run.s3.profile"
        )
    elif isinstance(error, FileNotFoundError) and any(
        sign in repr((error, error.__cause__)) for sign in ("NoSuchBucket", "bucket does not exist")
    ):
        fix = "Create the bucket, or name another one"
    elif _code(error) in _OTHER_REGION:
        fix = "Set run.s3.region to the bucket's"
    elif kind == "ProfileNotFound":
        fix = "Correct run.s3.profile, or add it to ~/.aws/config of every machine of the run"
    elif _is_library(error) and not _may_pass(error):
        fix = "Correct the URI, or run.s3"
    else:
        return None
    return ConfigError(f"{what}: {str(error).rstrip('.') or kind}. {fix}.")


def _words(error: BaseException) -> str:
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def retry(what: str, action: Callable[[], ResultT]) -> ResultT:
    """Run a remote action until it succeeds, a few times at most, with jittered waits that grow.

    Raises:
        OSError: the last failure; failures of the libraries below are wrapped in one.
        ConfigError: credentials, permission, bucket or region are the user's to mend.
    """
    began = time.monotonic()
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except Exception as error:
            refusal = _refusal(what, error)
            if refusal is not None:
                raise refusal from error
            if not _may_pass(error):
                raise
            limit = _ATTEMPTS_WHEN_SLOWED if _code(error) in _SLOWING else _ATTEMPTS
            wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)) * (0.5 + random.random())
            if attempt >= limit or time.monotonic() + wait_s > began + _GIVE_UP_S:
                times = "once" if attempt == 1 else f"{attempt} times, at last"
                raise OSError(f"{what} failed {times} with {type(error).__name__}: {_words(error)}") from error
            cause = _words(error)
            _LOG.warning("%s failed (attempt %d of %d), again in %.1f s: %s", what, attempt, limit, wait_s, cause)
            time.sleep(wait_s)


@dataclass(frozen=True)
class Piece:
    """Bytes of a file, and what the store said of the whole."""

    data: bytes
    size: int | None
    """Bytes of the file; None where the store did not say."""
    tag: str | None
    """Its ETag."""


def fetch(
    uri: str, start: int, length: int, tag: str | None = None, heard: Callable[[], object] = lambda: None
) -> Piece:
    """`length` bytes from `start`, fewer only where the file ends, from one request that is tried again when it fails.

    Args:
        uri: of a remote file.
        start: first byte.
        length: most bytes.
        tag: refuse a file whose ETag is another by now.
        heard: called when an attempt begins, and (S3) whenever bytes came; in any thread.

    Raises:
        FileNotFoundError: when it is not there.
        OSError: when it cannot be read, or has changed.
        ConfigError: see `retry`.
    """
    fs, path = filesystem(uri)

    def read() -> Piece:
        heard()
        if length <= 0:
            return Piece(b"", None, tag)
        if not is_s3(uri):
            return Piece(bytes(call(fs, "cat_file", path, start=start, end=start + length)), None, None)
        from fsspec.asyn import sync

        try:
            return cast(Piece, sync(fs.loop, _get, fs, path, start, length, tag, heard))
        except OSError as error:
            if _code(error) in ("InvalidRange", "416"):
                return Piece(b"", None, tag)  # behind the end of the file
            if _code(error) in ("PreconditionFailed", "412"):
                raise ReplacedError(f"{uri} was replaced while it was read. Read it again.") from error
            raise

    return retry(f"reading {uri}", read)


async def _get(fs: Any, path: str, start: int, length: int, tag: str | None, heard: Callable[[], object]) -> Piece:
    """One GET of a range, with a deadline for the answer and one for its body."""
    bucket, key, _ = fs.split_path(path)
    match = {} if tag is None else {"IfMatch": tag}
    asked = f"bytes={start}-{start + length - 1}"
    async with asyncio.timeout(_REQUEST_S):
        response = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=asked, **match)
    try:
        async with asyncio.timeout(deadline_s(response["ContentLength"])):
            parts = []
            while part := await response["Body"].read(_BODY_PART):
                heard()
                parts.append(part)
            data = b"".join(parts)
    finally:
        response["Body"].close()
    shown = response.get("ContentRange")
    size: int | None
    if shown is None:  # the server sent the whole file
        size, data = len(data), data[start : start + length]
    else:
        after = str(shown).rpartition("/")[2]
        size = int(after) if after.isdigit() else None
    if size is not None and len(data) != max(0, min(length, size - start)):
        raise _ShortBodyError(f"{len(data)} bytes came of {asked} of {size}")
    return Piece(data, size, response.get("ETag"))
