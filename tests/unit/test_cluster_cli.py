"""What a failure of the machine, the store or Ray looks like on the command line."""

import errno
import os

import pytest
from ray.exceptions import RayActorError, RayTaskError

from cluster.cli import _environment_failure
from data_service.errors import ConfigError
from data_service.object_store import retry


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/x"), ("OSError", "/runs/x", "Free some space")),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/runs"), ("PermissionError", "may write")),
        (TimeoutError("no answer."), ("TimeoutError: no answer. Check",)),
        (RayActorError(), ("RayActorError", "stormjib logs")),
        (RayTaskError("f", "Traceback:\n  line\nValueError: 3", ValueError("3")), ("ValueError: 3. See",)),  # type: ignore[no-untyped-call]
    ],
)
def test_it_is_one_line_with_a_hint(error: Exception, parts: tuple[str, ...]) -> None:
    text = _environment_failure(error)
    assert text is not None
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    assert _environment_failure(ValueError("x")) is None


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "Create the bucket"),
        (PermissionError("Access Denied"), "Set credentials"),
    ],
)
def test_what_a_store_refuses_is_the_users_to_mend(error: OSError, fix: str) -> None:
    def refused() -> None:
        raise error

    with pytest.raises(ConfigError, match=fix) as raised:
        retry("writing s3://b/x", refused)
    assert str(raised.value).startswith("writing s3://b/x: ")


def test_an_absent_file_stays_the_callers_business() -> None:
    def absent() -> None:
        raise FileNotFoundError("b/x")

    with pytest.raises(FileNotFoundError):
        retry("reading s3://b/x", absent)
