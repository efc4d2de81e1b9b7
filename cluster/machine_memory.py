"""How much memory this machine has for a run: what is there, or what a container may take of it. No Ray, no torch."""

from pathlib import Path, PurePosixPath

import psutil

__all__ = ["container_bytes", "machine_bytes"]

_GROUPS = "sys/fs/cgroup"


def machine_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    total, limit = int(psutil.virtual_memory().total), container_bytes()
    return total if limit is None else min(total, limit)


def container_bytes(root: Path = Path("/")) -> int | None:
    """Least limit of this process's control group and of those above it; None where there is none.

    That is `memory.max` of version 2 (Linux, admin-guide/cgroup-v2), `memory.limit_in_bytes` of version 1. A container
    may see the paths of its host's groups and only its own group's files, which then lie at the top: what is not there
    is passed over.

    Args:
        root: where `/proc` and `/sys` are.
    """
    limits = []
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, name = root / _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = PurePosixPath(path).relative_to("/")
        for group in (inner, *inner.parents):
            limits += [int(found) for found in _lines(top / group / name) if found.isdecimal()]
    return min(limits, default=None)


def _lines(file: Path) -> list[str]:
    """The lines of a small file; none where it cannot be read."""
    try:
        return file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
