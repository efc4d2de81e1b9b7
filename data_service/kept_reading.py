"""Files that were read for another preparation in the same work folder: those that are asked for again are kept.

Reading takes a file on its own, so what came of it stays good when others are mended, added or taken away, as long as
the settings are the same (the work folder's name says so). Everything behind reading depends on all files.

    read/files.json     identities of the files by number; absent while this changes anything
    read/NNNNN.done     see `work_items`

Owns this list and the renumbering. Knows nothing of what is in the files. For folders of this machine, which are
claimed.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_service import storage

__all__ = ["keep_reading"]

_LIST = "files.json"


def keep_reading(work_uri: str, identities: Sequence[str]) -> None:
    """Make a work folder one for these files; what was read of them is kept, all else that is of others is removed.

    Args:
        work_uri: the work folder, of this machine; made where it is absent.
        identities: what makes each file the same, by number.
    """
    work = storage.local_path(work_uri)
    read, kept = work / "read", work / "kept"
    wanted = list(identities)
    found = _listed(read / _LIST)
    if found == wanted:
        return
    if found is None:  # nothing is there, or a kill came in the middle of this
        if work.exists():
            shutil.rmtree(work)
        read.mkdir(parents=True)
    else:
        (read / _LIST).unlink()
        kept.mkdir()
        places: dict[str, list[int]] = {}
        for number, identity in enumerate(found):
            places.setdefault(identity, []).append(number)
        for number, identity in enumerate(wanted):
            if places.get(identity):
                _move(read, places[identity].pop(0), kept, number)
        for other in work.iterdir():
            if other != kept:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        kept.rename(read)
    (read / _LIST).write_text(json.dumps(wanted, ensure_ascii=False), encoding="utf-8")


def _listed(path: Path) -> list[str] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, list) else None


def _move(read: Path, number: int, kept: Path, new: int) -> None:
    """Move what was read of a file, if its reading was finished, and rename what its record names."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, AttributeError):
        record = json.loads((read / f"{number:05d}.done").read_text(encoding="utf-8"))
        before, behind = f"read/{number:05d}/", f"read/{new:05d}/"
        record["files"] = {behind + path.removeprefix(before): value for path, value in record["files"].items()}
        if (read / f"{number:05d}").is_dir():  # a file with neither good records nor bad ones left none
            (read / f"{number:05d}").rename(kept / f"{new:05d}")
        (kept / f"{new:05d}.done").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
