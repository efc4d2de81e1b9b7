"""The Engine replica: weights, cache and continuous batching behind Ray Serve's handles.

Owns the process of one engine. Errors that a client caused or can wait out are yielded as the last item, not raised:
Ray wraps raised exceptions in its own classes. The class itself is plain; `serve.deployment` makes it a deployment.
"""

import logging
import os
from collections.abc import AsyncGenerator

from serve.engine.driver import EngineDriver
from serve.engine.messages import Delta, EngineRequest, EngineStats
from serve.errors import EngineFailedError, ServeError
from serve.spec import ServeSpec

__all__ = ["Engine"]

_LOG = logging.getLogger(__name__)


class Engine:
    """One replica."""

    def __init__(self, spec: ServeSpec) -> None:
        """Load the weights; torch is imported here, in the replica."""
        from serve.weights import build_engine

        self._core, _ = build_engine(spec.model_uri, spec.config, spec.device)
        self._driver: EngineDriver | None = None
        _LOG.info("engine of %s is ready, pid %d", spec.model_uri, os.getpid())

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Delta] | ServeError]:
        """Complete a request piece by piece; cancelling the call aborts it."""
        pieces = self._running().generate(request)
        try:
            async for deltas in pieces:
                yield deltas
        except ServeError as error:
            yield error
        finally:
            await pieces.aclose()

    async def complete(self, request: EngineRequest) -> list[Delta] | ServeError:
        """Complete a request as a whole; cancelling the call aborts it."""
        gathered: list[Delta] = []
        pieces = self._running().generate(request, interval_s=None)
        try:
            async for deltas in pieces:
                gathered.extend(deltas)
        except ServeError as error:
            return error
        finally:
            await pieces.aclose()
        return gathered

    async def stats(self) -> EngineStats:
        """Load at this moment."""
        return self._running().stats()

    async def check_health(self) -> None:
        """Called by Ray Serve; an engine whose thread has ended is replaced."""
        if not self._running().alive:
            raise EngineFailedError("the engine's thread has ended. See the replica's log.")

    def _running(self) -> EngineDriver:
        """The driver, started with the first call: it belongs to the event loop of the calls."""
        if self._driver is None:
            self._driver = EngineDriver(self._core)
        return self._driver
