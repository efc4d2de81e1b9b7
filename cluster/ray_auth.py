"""Which token this process shows to Ray. Owns the environment variables and Ray's caches of them; nothing else."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["shown_token"]

_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def shown_token(environment: Mapping[str, str]) -> Iterator[None]:
    """Show the token that `environment` names, and no other, while the block runs; children inherit it.

    Ray 2.60 reads mode and token once and caches both, so that a process that joins several clusters must have it look
    again. The mode must be read anew before the token is dropped.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    _set({name: environment.get(name) for name in _VARIABLES})
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
