"""Arrow Flight itself: record batches that lie in memory, sent over loopback and dropped on arrival.

    python -m benchmarks.peers.raw_flight serve ROWS SEQ_LEN      prints its port
    python -m benchmarks.peers.raw_flight read PORT MESSAGES      prints its readings

The batches have the schema and the size of the data service's messages. Nothing is looked up, gathered, checked or
copied on either side: this is as fast as the transport goes.
"""

import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from benchmarks.parts.usage import measure, report
from data_service.schema import RowBlock, block_to_batch, wire_schema
from tests.helpers.plans import hand_made

NUM_BATCHES = 64
"""Batches that are sent in turn: more than a cache of the processor holds."""


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    def __init__(self, batches: list[pa.RecordBatch]) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._batches = batches

    def do_get(self, context: Any, ticket: Any) -> Any:
        messages = [self._batches[number % NUM_BATCHES] for number in range(int(ticket.ticket))]
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(messages[0].schema, messages))


def _serve(rows: int, seq_len: int) -> None:
    draw = np.random.default_rng(0)
    plan = hand_made([("made-up", 0, 1000, 64)], seq_len=seq_len)
    schema = wire_schema(plan, np.dtype(np.uint16))
    batches = []
    for _ in range(NUM_BATCHES):
        ids = np.arange(rows)
        block = RowBlock(
            row_id=ids.astype(np.uint64),
            tokens=draw.integers(0, 60_000, (rows, seq_len + 1)).astype(np.uint16),
            length=np.full(rows, seq_len + 1, np.uint32),
            starts=ids.astype(np.uint32),
            start_offsets=np.arange(rows + 1, dtype=np.int32),
            answer_bits=None,
            labels=None,
            row_crc=ids.astype(np.uint32),
        )
        batches.append(block_to_batch(block, block.row_id, ids.astype(np.uint32), schema))
    server = _Server(batches)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.shutdown()


def _sizes(port: int, messages: int, seq_len: int) -> Iterator[int]:
    client = flight.FlightClient(f"grpc://127.0.0.1:{port}", generic_options=[("grpc.enable_http_proxy", 0)])
    for chunk in client.do_get(flight.Ticket(str(messages).encode())):
        yield chunk.data.num_rows * (seq_len + 1)
    client.close()


def _two_streams(port: int, messages: int, seq_len: int) -> Iterator[int]:
    totals = [0, 0]

    def read(number: int) -> None:
        totals[number] = sum(_sizes(port, messages // 2, seq_len))

    threads = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield sum(totals)


def main() -> None:
    """Serve, or read."""
    role, first, second = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if role == "serve":
        _serve(first, second)
        return
    seq_len = int(sys.argv[4])
    report(
        [
            measure("one stream", _sizes(first, second, seq_len)),
            measure("two streams", _two_streams(first, second, seq_len)),
        ]
    )


if __name__ == "__main__":
    main()
