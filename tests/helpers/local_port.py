"""The engine in the test's own event loop, behind the interface that the ingress takes."""

from collections.abc import AsyncGenerator

from serve.engine.driver import EngineDriver
from serve.engine.messages import Delta, EngineRequest


class LocalPort:
    def __init__(self, driver: EngineDriver) -> None:
        self.driver = driver

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Delta]]:
        pieces = self.driver.generate(request, interval_s=0.0)
        try:
            async for deltas in pieces:
                yield deltas
        finally:
            await pieces.aclose()

    async def complete(self, request: EngineRequest) -> list[Delta]:
        return [delta async for deltas in self.driver.generate(request, interval_s=None) for delta in deltas]

    async def ready(self) -> None:
        self.driver.stats()
