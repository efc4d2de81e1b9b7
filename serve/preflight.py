"""What can be known about an endpoint before any of it is started: the bearer key and the port.

Owns these checks for whoever deploys, now or after a training. Imports neither Ray nor torch.
"""

import hashlib
import os
import socket

from data_service.errors import ConfigError
from serve.config import ServeConfig

__all__ = ["check_deployable", "check_port", "free_port", "key_digest", "read_key", "url_of"]


def check_deployable(config: ServeConfig, *, local: bool) -> None:
    """Fail now where `serve.deployment.deploy` would fail later for a reason that is known already.

    Args:
        config: the `serve` section.
        local: whether Ray, and with it the HTTP proxy, will be started on this machine.

    Raises:
        ConfigError: the key's variable is not set, or the port is taken.
    """
    read_key(config)
    if local and config.port:
        check_port(config.host, config.port)


def read_key(config: ServeConfig) -> bytes | None:
    """Digest of the bearer key that clients must send; None where none is asked for.

    Raises:
        ConfigError: the key's variable is not set.
    """
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ConfigError(
            f"serve.api_key_env={config.api_key_env}, but that environment variable is not set. "
            "Set it to the key that clients must send."
        )
    return key_digest(key)


def key_digest(key: str) -> bytes:
    """What is kept of the bearer key: replicas and their arguments never hold the key itself."""
    return hashlib.sha256(key.encode()).digest()


def free_port(host: str) -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(host: str, port: int) -> None:
    """Fail early where the port is taken on this machine; elsewhere the proxy itself would fail.

    Raises:
        ConfigError: nothing can listen there.
    """
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as cause:
            raise ConfigError(
                f"serve.host={host} serve.port={port} cannot be listened on ({cause.strerror}). "
                "Set another serve.port, or serve.port=0 for a free one."
            ) from cause


def url_of(host: str, port: int) -> str:
    """Base address of a proxy, as this machine reaches it."""
    address = {"0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
