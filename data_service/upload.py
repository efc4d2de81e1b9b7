"""Sends one file to S3: small ones by one request, large ones piece by piece, each piece tried again by itself.

A piece that fails costs that piece and not the file, however long the file takes. The object appears when the last
request is answered, or not at all; an upload that is given up is aborted, so that its pieces cost nothing. One that is
cut off by a kill leaves its pieces to the bucket's lifecycle rule for unfinished uploads.
"""

import contextlib
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from data_service.errors import ConfigError
from data_service.object_store import deadline_s, filesystem, retry

__all__ = ["upload"]

_PIECE_BYTES = 32 << 20
"""S3 takes pieces of 5 MiB to 5 GiB."""
_MOST_PIECES = 9_000
"""S3 takes 10,000."""
_PARALLEL = 4
_MARK = "upload"
"""The metadata that says which upload made an object: another writer's may be as long."""


def upload(uri: str, file: BinaryIO, num_bytes: int) -> None:
    """Write an object, replacing one that is there.

    Args:
        uri: on S3.
        file: of this machine; read by position, from its start, a few pieces in memory at a time.
        num_bytes: its length.

    Raises:
        OSError: the store did not take it.
        ConfigError: see `object_store.retry`.
    """
    fs, path = filesystem(uri, "transfer")
    bucket, key, _ = fs.split_path(path)
    where = {"Bucket": bucket, "Key": key}
    piece_bytes = max(_PIECE_BYTES, -(-num_bytes // _MOST_PIECES))

    def ask(method: str, length: int = 0, **fields: Any) -> dict[str, Any]:
        return _ask(fs, method, length, **where, **fields)

    def piece(begin: int) -> bytes:
        return os.pread(file.fileno(), min(piece_bytes, num_bytes - begin), begin)

    if num_bytes <= piece_bytes:
        data = piece(0)
        retry(f"writing {uri}", lambda: ask("put_object", len(data), Body=data))
        return
    mark = uuid.uuid4().hex
    begun = retry(f"writing {uri}", lambda: ask("create_multipart_upload", Metadata={_MARK: mark}))
    upload_id = begun["UploadId"]

    def send(number: int) -> dict[str, Any]:
        data = piece((number - 1) * piece_bytes)
        sent = retry(
            f"writing piece {number} of {uri}",
            lambda: ask("upload_part", len(data), UploadId=upload_id, PartNumber=number, Body=data),
        )
        return {"PartNumber": number, "ETag": sent["ETag"]}

    try:
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="upload") as pool:
            sending = [pool.submit(send, number) for number in range(1, -(-num_bytes // piece_bytes) + 1)]
            try:
                pieces = {"Parts": [one.result() for one in sending]}
            finally:
                for one in sending:
                    one.cancel()
        _finish(uri, mark, ask, UploadId=upload_id, MultipartUpload=pieces)
    except BaseException:
        with contextlib.suppress(OSError, ConfigError):
            retry(f"giving up {uri}", lambda: ask("abort_multipart_upload", UploadId=upload_id))
        raise


def _finish(uri: str, mark: str, ask: Callable[..., dict[str, Any]], **fields: Any) -> None:
    """Put the pieces together; an answer that got lost is no failure where the object bears this upload's mark."""
    try:
        retry(f"writing {uri}", lambda: ask("complete_multipart_upload", **fields))
    except OSError:
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            found = retry(f"looking at {uri}", lambda: ask("head_object"))
        if found.get("Metadata", {}).get(_MARK) != mark:
            raise


def _ask(fs: Any, method: str, num_bytes: int, **fields: Any) -> dict[str, Any]:
    """One request, with a deadline."""
    from fsspec.asyn import sync

    return cast(dict[str, Any], sync(fs.loop, fs._call_s3, method, timeout=deadline_s(num_bytes), **fields))
