"""`stormjib doctor [FILE]`: look for what would keep a run from working here, and say what to change."""

import argparse
import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.commands.arguments import use_s3
from cluster.config import RunConfig, load_config
from data_service import storage
from data_service.bearer import TOKEN_VARIABLE
from data_service.errors import ConfigError, DataError
from data_service.readers import find_files

__all__ = ["add_arguments", "execute"]

_PACKAGES = ("ray", "torch", "deepspeed", "pyarrow", "grpcio", "s3fs", "tokenizers", "safetensors")
_MIN_FREE_BYTES = 5 * 2**30
_MIN_SHM_BYTES = 512 * 2**20
_CONNECT_S = 3.0


@dataclass(frozen=True)
class _Finding:
    ok: bool
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE is optional."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="a run's YAML file to check as well")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="dotted overrides")


def execute(arguments: argparse.Namespace) -> int:
    """Print one line for each thing looked at; exit 1 when one of them is wrong."""
    findings = [*_packages(), *_machine()]
    if arguments.file is not None:
        findings.extend(_run(arguments.file, arguments.overrides))
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.text}")
    return 0 if all(finding.ok for finding in findings) else 1


def _packages() -> Iterator[_Finding]:
    yield _Finding(sys.version_info >= (3, 11), f"Python {sys.version.split()[0]} (3.11 or newer is needed)")
    for name in _PACKAGES:
        try:
            yield _Finding(True, f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield _Finding(False, f"{name} is not installed: pip install stormjib")


def _machine() -> Iterator[_Finding]:
    yield _Finding(True, f"{os.cpu_count()} CPUs; {_gpus()}")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    yield _Finding(
        free >= _MIN_FREE_BYTES,
        f"{free / 2**30:.1f} GiB free in {tempfile.gettempdir()} ({_MIN_FREE_BYTES / 2**30:.0f} GiB are needed; "
        "set TMPDIR to another disk)",
    )
    shm = Path("/dev/shm")
    if shm.exists():
        free = shutil.disk_usage(shm).free
        yield _Finding(
            free >= _MIN_SHM_BYTES,
            f"{free / 2**20:.0f} MiB free in /dev/shm ({_MIN_SHM_BYTES / 2**20:.0f} MiB are needed; in a container "
            "raise --shm-size)",
        )


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU: runs go on CPU in fp32"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} GPUs: {', '.join(sorted(set(names)))}"


def _run(file: str, overrides: list[str]) -> Iterator[_Finding]:
    config = load_config(file, overrides)
    use_s3(config)
    yield _Finding(True, f"{file}: valid")
    probe = f"{config.root}/control/doctor-{os.getpid()}"
    try:
        storage.write_bytes(probe, b"stormjib")
        storage.remove_file(probe)
        yield _Finding(True, f"{config.root}: writable")
    except (OSError, ConfigError) as error:
        yield _Finding(False, f"{config.root}: not writable ({error}); set run.storage to another place")
    yield from _sources(config)
    yield from _service(config)


def _sources(config: RunConfig) -> Iterator[_Finding]:
    for number, source in enumerate(config.data.sources):
        try:
            found = find_files((source,))
            yield _Finding(True, f"data.sources.{number}: {len(found)} files at {source.path}")
        except (DataError, ConfigError) as error:
            yield _Finding(False, str(error))


def _service(config: RunConfig) -> Iterator[_Finding]:
    """A data service that is said to run already: its token, and whether its addresses take connections."""
    addresses = config.data.service.address
    if addresses:
        set_here = bool(os.environ.get(TOKEN_VARIABLE))
        yield _Finding(set_here, f"{TOKEN_VARIABLE} is {'set' if set_here else 'not set; the data service needs it'}")
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
            yield _Finding(True, f"data.service.address {address}: takes connections")
        except (OSError, ValueError) as error:
            yield _Finding(False, f"data.service.address {address}: {error}; start the service, or set another address")
