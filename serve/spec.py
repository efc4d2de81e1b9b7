"""What is served, and where it answers: the plain values that cross from the driver to the replicas.

Owns no behaviour and imports neither torch nor Ray.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from serve.config import ServeConfig

__all__ = ["Endpoint", "ServeSpec"]


@dataclass(frozen=True)
class ServeSpec:
    """One model to serve."""

    model_uri: str
    """A Hugging Face folder (path or URI) with weights and tokenizer."""
    model_name: str
    """The `model` clients ask for."""
    step: int | None = None
    """Training step that made the weights, where known."""
    digest: str | None = None
    """Digest of the checkpoint, where known."""
    config: ServeConfig = ServeConfig()
    """The `serve` section."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the engine computes."""

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of every answer: training step and checkpoint digest."""
        step = "unknown" if self.step is None else str(self.step)
        return f"step-{step}" if self.digest is None else f"step-{step}-{self.digest[:16]}"

    @property
    def app_name(self) -> str:
        """Name of the Serve application: the exports of one run share it, other runs have others."""
        home = self.model_uri.rstrip("/").rpartition("/")[0]
        digest = hashlib.blake2b(home.encode(), digest_size=4).hexdigest()
        return f"stormjib-{re.sub(r'[^A-Za-z0-9._-]', '-', self.model_name)}-{digest}"


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint."""

    url: str
    """Base address, such as `http://127.0.0.1:8000`; the OpenAI client takes `url + "/v1"`."""
    model_name: str
    fingerprint: str
    app_name: str
    """The Serve application behind it."""
    started_serve: bool
    """Whether Ray Serve itself was started for it."""
