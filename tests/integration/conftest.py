"""One S3 server for all tests that need a store, and a proxy before it."""

from collections.abc import Iterator

import pytest

from data_service import object_store
from tests.helpers.s3_faults import FaultProxy, fault_proxy
from tests.helpers.s3_server import S3Server, running_server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Skips where no server is installed."""
    with running_server() as found:
        yield found


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The server behind its proxy is what `s3://` means here; waits are short."""
    with fault_proxy(s3_server.port) as found:
        for name, value in s3_server.environment(found.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("STORMJIB_S3", raising=False)
        monkeypatch.setattr(object_store, "_SILENT_S", 1.0)
        monkeypatch.setattr(object_store, "_FIRST_WAIT_S", 0.02)
        _forget_connections()
        yield found
        _forget_connections()


def _forget_connections() -> None:
    import s3fs

    object_store._s3_options.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
