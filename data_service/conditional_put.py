"""A file of a store that only one of several writers may create, and a look at whether the store keeps to that.

Owns the conditional put (`If-None-Match: *` on S3), the mark that tells whose file it is, and the trial of a store.
"""

import contextlib
import uuid

from data_service.errors import ConfigError
from data_service.object_store import call, filesystem, is_s3, retry, s3_environment

__all__ = ["check_conditional_put", "put_new"]

_checked: set[tuple[str, ...]] = set()
"""Stores that were tried in this process: (settings, bucket)."""


def put_new(uri: str, data: bytes) -> bool:
    """Write a remote file unless one is there; of several writers exactly one wins.

    Returns:
        Whether this call wrote it.

    Raises:
        OSError: when the store does not do it.
        ConfigError: see `object_store.retry`.
    """
    fs, path = filesystem(uri)
    writer = uuid.uuid4().hex
    mark = {"Metadata": {"writer": writer}} if is_s3(uri) else {}

    def put() -> None:
        try:
            call(fs, "pipe_file", path, data, mode="create", num_bytes=len(data), **mark)
        except OSError as error:
            # Stores differ in what they say beside the code; some leave out which condition failed.
            if "PreconditionFailed" in repr(error) or "PreconditionFailed" in repr(error.__cause__):
                raise FileExistsError(f"{uri} is there already.") from error
            raise

    try:
        retry(f"writing {uri}", put)
    except FileExistsError:
        # An earlier attempt may have arrived although its answer did not; aiohttp makes one by itself when a connection
        # that it used before is gone (3.14). What others wrote may be the same bytes, so the object says who wrote it.
        return is_s3(uri) and writer in retry(f"looking at {uri}", lambda: call(fs, "metadata", path)).values()
    return True


def check_conditional_put(folder_uri: str) -> None:
    """Create a file twice in a folder on S3, once for each bucket in this process.

    Raises:
        ConfigError: when the store lets the second writer replace the file, or takes none.
    """
    store = (*s3_environment().values(), folder_uri.split("/")[2])
    if store in _checked:
        return
    probe = f"{folder_uri.rstrip('/')}/.check-{uuid.uuid4().hex}.tmp"
    fs, path = filesystem(probe)
    try:
        put_new(probe, b"first")
        if put_new(probe, b"second"):
            raise ConfigError(
                f"{folder_uri}: manifests were to be published there, and the store lets a second writer replace a "
                "file in spite of If-None-Match. Use a store that honours it, or a folder."
            )
    finally:
        with contextlib.suppress(OSError, ConfigError):
            retry(f"deleting {probe}", lambda: call(fs, "rm_file", path))
    _checked.add(store)
