"""Raw calls to both planes of a data service, without its client."""

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as flight

from data_service import control_pb2_grpc as pb_grpc
from data_service.bearer import CHANNEL_OPTIONS, bearer_metadata
from data_service.ticket import Ticket
from tests.helpers.data_runs import TOKEN


class RawWorker:
    """Flight calls to one data worker."""

    def __init__(self, address: str, token: str | None = TOKEN) -> None:
        self.client = flight.FlightClient(f"grpc://{address}", generic_options=[("grpc.enable_http_proxy", 0)])
        headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
        self.options = flight.FlightCallOptions(timeout=20, headers=headers)

    def batches(self, ticket: Ticket | bytes) -> list[pa.RecordBatch]:
        data = ticket if isinstance(ticket, bytes) else ticket.to_bytes()
        return [chunk.data for chunk in self.client.do_get(flight.Ticket(data), self.options)]

    def table(self, ticket: Ticket | bytes) -> pa.Table:
        data = ticket if isinstance(ticket, bytes) else ticket.to_bytes()
        return self.client.do_get(flight.Ticket(data), self.options).read_all()


@contextlib.contextmanager
def raw_worker(address: str, token: str | None = TOKEN) -> Iterator[RawWorker]:
    worker = RawWorker(address, token)
    try:
        yield worker
    finally:
        worker.client.close()


class RawControl:
    """gRPC calls to one control plane."""

    def __init__(self, channel: grpc.Channel, token: str | None) -> None:
        self.channel = channel
        self.stub = pb_grpc.DataControlStub(channel)
        self.metadata = () if token is None else bearer_metadata(token)

    def __call__(self, method: str, request: Any) -> Any:
        return getattr(self.stub, method)(request, timeout=10, metadata=self.metadata)


@contextlib.contextmanager
def raw_control(address: str, token: str | None = TOKEN) -> Iterator[RawControl]:
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        yield RawControl(channel, token)
