"""What the actors of a run's data service do in their processes: serve, say where, answer.

Owns the choice of ports. Refuses to know Ray.
"""

import os
import time

from data_service.config import DataServiceConfig

__all__ = ["ControlProcess", "Start", "WorkerProcess"]

PORT_S = 5.0
"""A control plane that comes back waits so long for the port of the one that died."""
METRICS_PORTS = 64
"""An actor takes the first free one of so many ports from `data.service.metrics_port` on."""

Start = tuple[str, int, str | None]
"""`host:port`, process id, and `host:port` of the metrics where they are served."""


class ControlProcess:
    """The control plane in an actor's process."""

    def __init__(
        self, dataset_uri: str, dataset_digest: str, token: str, host: str, port: int, metrics_port: int | None
    ) -> None:
        from data_service.control import ControlServer

        self._server = ControlServer(
            dataset_uri,
            token,
            dataset_digest=dataset_digest,
            host=host,
            port=port,
            metrics_port=_metrics_ports(metrics_port),
        )

    def start(self) -> Start:
        """Serve; returns where.

        Raises:
            OSError: the port stays taken.
        """
        deadline = time.monotonic() + PORT_S
        while True:
            try:
                return self._server.start(), os.getpid(), self._server.metrics_address
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def ping(self) -> None:
        """Answer."""


class WorkerProcess:
    """A data worker in an actor's process."""

    def __init__(
        self,
        dataset_uri: str,
        dataset_digest: str,
        control: str,
        token: str,
        host: str,
        config: DataServiceConfig,
    ) -> None:
        from data_service.server import DataWorker

        self._worker = DataWorker(
            dataset_uri,
            control,
            token,
            dataset_digest=dataset_digest,
            host=host,
            cache_dir=config.cache_dir,
            cache_bytes=config.cache_bytes,
            metrics_port=_metrics_ports(config.metrics_port),
        )

    def start(self) -> Start:
        """Serve and register; returns where."""
        return self._worker.start(), os.getpid(), self._worker.metrics_address

    def ping(self) -> None:
        """Answer."""


def _metrics_ports(first: int | None) -> int | range | None:
    """Where an actor may serve its metrics: several may be on one node."""
    return range(first, min(first + METRICS_PORTS, 65_536)) if first else first
