"""The bearer token of the data service, and the options of every channel to it.

Owns how the token travels and how it is compared. Refuses to print it.
"""

import hmac
import os
from pathlib import Path

from data_service.errors import ConfigError

__all__ = ["CHANNEL_OPTIONS", "MIN_TOKEN_LENGTH", "TOKEN_VARIABLE", "BearerToken", "bearer_metadata", "read_token"]

CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)
"""Of every channel to a control plane: quick to reconnect, and straight to its address whatever proxy is set."""
TOKEN_VARIABLE = "STORMJIB_DATA_TOKEN"
MIN_TOKEN_LENGTH = 16


def bearer_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that a caller sends with each call."""
    return (("authorization", f"Bearer {token}"),)


class BearerToken:
    """The token that callers must show."""

    def __init__(self, token: str) -> None:
        """Keep what an `authorization` header must hold.

        Raises:
            ValueError: for an empty token, which anybody has.
        """
        if not token:
            raise ValueError("the data service was given an empty token. Give it a secret.")
        self._expected = f"Bearer {token}".encode()

    def accepts(self, header: str | bytes | None) -> bool:
        """Whether the value of an `authorization` header is this token's; takes the same time wherever they differ."""
        given = header.encode("utf-8", "replace") if isinstance(header, str) else header or b""
        return hmac.compare_digest(given, self._expected)


def read_token(file: str | None) -> str:
    """The token from a file, or from the environment variable STORMJIB_DATA_TOKEN where no file is named.

    Raises:
        ConfigError: when there is none, or one that is too short or could not travel in a header.
    """
    if file is not None:
        try:
            token, where = Path(file).read_text(encoding="utf-8").strip(), file
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the data service's token was asked for in {file}, which cannot be read: "
                f"{getattr(error, 'strerror', None) or 'it is not text'}. Name a file that holds the token alone."
            ) from error
    else:
        token, where = os.environ.get(TOKEN_VARIABLE, "").strip(), f"the environment variable {TOKEN_VARIABLE}"
    if not token:
        raise ConfigError(
            f"the data service's token was asked for in {where}, nothing is there. Put one secret of at least "
            f"{MIN_TOKEN_LENGTH} characters into it, the same for the control plane, the workers and the runs."
        )
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"the data service's token in {where} has {len(token)} characters. Use at least {MIN_TOKEN_LENGTH} "
            "printable ASCII ones without spaces, such as 64 hexadecimal digits."
        )
    return token
