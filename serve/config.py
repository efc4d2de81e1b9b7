"""Configuration of `serve`."""

import ipaddress
from typing import Literal, Self

from pydantic import Field, model_validator

from data_service.settings import Section

__all__ = ["ReplicasConfig", "ServeConfig", "is_loopback"]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener there.

    Raises:
        ValueError: neither an IP address nor `localhost`.
    """
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


class ReplicasConfig(Section):
    """How many engine replicas may run."""

    min: int = Field(1, ge=1)
    """Fewest replicas."""
    max: int = Field(1, ge=1)
    """Most replicas."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}. Raise max or lower min.")
        return self


class ServeConfig(Section):
    """The inference endpoint."""

    promote: Literal["best", "last"] = "best"
    """Which checkpoint is exported and served: the best by the task's metric on the held-out split, or the newest."""
    model_name: str | None = None
    """The `model` clients ask for; by default the run's name."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Engine replicas."""
    host: str = "127.0.0.1"
    """Address the HTTP proxy listens on; anything but loopback needs `api_key_env`."""
    port: int = Field(8000, ge=0, le=65535)
    """Port of the HTTP proxy; 0 takes a free one."""
    api_key_env: str | None = None
    """Environment variable that holds the bearer key clients must send."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Weights and cache; `auto` is bf16 on GPUs and fp32 on CPUs."""
    cpus_per_replica: float = Field(1.0, gt=0)
    """Logical CPUs an engine replica takes; its thread count, rounded up."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """GPUs an engine replica takes."""
    max_num_seqs: int = Field(16, ge=1)
    """Sequences decoded together."""
    kv_cache_tokens: int = Field(16384, ge=64)
    """Tokens the KV cache of a replica holds."""
    block_tokens: int = Field(16, ge=1)
    """Tokens in a KV block."""
    max_queue: int = Field(256, ge=1)
    """Waiting requests beyond which a replica answers 429."""

    @model_validator(mode="after")
    def _open_ports_have_keys(self) -> Self:
        try:
            loopback = is_loopback(self.host)
        except ValueError as cause:
            raise ValueError(f"host={self.host!r} is not an IP address. Set one, or localhost.") from cause
        if not loopback and self.api_key_env is None:
            raise ValueError(
                f"host={self.host} is open beyond this machine and api_key_env is not set. "
                "Name the environment variable that holds the key, or set host=127.0.0.1."
            )
        return self
