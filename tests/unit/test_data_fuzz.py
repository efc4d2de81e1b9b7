"""10,000 tickets and control messages, damaged, odd or random, to real processes: refused or right, and none kept."""

import copy
import json
import random
import socket
from collections import Counter

import grpc
import psutil
import pyarrow.flight as flight
import pytest

from data_service import control_pb2 as pb
from data_service.errors import CursorMismatchError
from data_service.planning import check_plan, make_plan
from data_service.ticket import Ticket
from tests.helpers.data_runs import GLOBAL_BATCH, control_process, small_order, worker_process
from tests.helpers.flight_calls import raw_control, raw_worker
from tests.helpers.written_datasets import stream_dataset

TICKETS = 6000
CONTROL_MESSAGES = 4000
GROWTH_BYTES = 24 * 2**20
"""Allowed between the first third and the end: allocators keep some of what they had."""
ODD = (
    *(-1, 0, 1, 2, 33, 255, 256, 2**16, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 2**128, -(2**63)),
    *(0.5, 1e308, float("nan"), float("inf"), True, False, None),
    *("", "x", "\x00", "é" * 40, "x" * 5000, "\ud800"),
    *([], {}, [[]], [1, 2], [0] * 2000, {"v": 2}, {"a": {"b": {"c": 1}}}),
)
"""Values in place of others."""
MAX_MESSAGE_BYTES = 1 << 18
METHODS = ("Register", "Heartbeat", "Leave", "Members", "GetPlan", "ReportFailure", "Stats")
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("fuzz") / "d")


def paths_in(value, path=()):
    """Every place in a tree of lists and objects."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def with_odd_values(draw, tree):
    """A tree with one to three places replaced, removed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        path = draw.choice([path for path in paths_in(tree) if path])
        inside = tree
        for key in path[:-1]:
            inside = inside[key]
        how = draw.random()
        if how < 0.7:
            inside[path[-1]] = copy.deepcopy(draw.choice(ODD))
        elif how < 0.8 and isinstance(inside[path[-1]], int):
            inside[path[-1]] += draw.choice((-1, 1, 7))
        elif how < 0.9:
            del inside[path[-1]]
        elif isinstance(inside, list):
            inside.append(copy.deepcopy(inside[path[-1]]))
        else:
            inside[draw.choice(("", "x", "members", "plan"))] = inside[path[-1]]
        if not [path for path in paths_in(tree) if path]:
            break
    return tree


def with_other_bytes(draw, data):
    """Bytes with a few of them changed, cut out or put in."""
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(damaged) + 1)
        how = draw.random()
        if how < 0.5 and place < len(damaged):
            damaged[place] = draw.choice((draw.randrange(256), ord(draw.choice('0123456789-{}[]",:.eE '))))
        elif how < 0.7:
            del damaged[place : place + draw.randint(1, 40)]
        elif how < 0.9:
            damaged[place:place] = draw.randbytes(draw.randint(1, 20))
        else:
            damaged[place:place] = damaged[: draw.randint(1, 60)]
    return bytes(damaged)


def with_another_digit(draw, data):
    """Bytes with one digit changed: often still well formed."""
    damaged = bytearray(data)
    place = draw.choice([place for place, byte in enumerate(data) if byte in b"0123456789"])
    damaged[place] = draw.choice(b"0123456789")
    return bytes(damaged)


def tickets(draw, plan, count):
    """Damaged tickets: by structure, by bytes, by one digit, and nothing but bytes."""
    for number in range(count):
        first = draw.choice((0, draw.randrange(10**6), 2**40))
        members = tuple(sorted({f"w{draw.randrange(9)}" for _ in range(draw.randrange(4))}))
        slots = sorted(draw.sample(range(GLOBAL_BATCH + 1), 2))
        member = draw.randrange(max(1, len(members)))
        good = Ticket(plan, first, first + draw.randint(1, 9), (slots[0], slots[1]), members, member).to_bytes()
        if number % 4 == 0:
            yield json.dumps(with_odd_values(draw, json.loads(good))).encode("utf-8", "surrogatepass")
        elif number % 4 == 1:
            yield with_other_bytes(draw, good)
        elif number % 4 == 2:
            yield with_another_digit(draw, good)
        else:
            yield draw.randbytes(draw.choice((0, 3, 50, 2000))) if draw.random() < 0.9 else b"[" * 100_000


def expected_answer(data, manifest):
    """The ticket where a worker must answer it, else None."""
    try:
        ticket = Ticket.from_bytes(data)
        check_plan(ticket.plan, manifest)
        return ticket, ticket.rows()
    except (ValueError, CursorMismatchError):
        return None


def garbage_to(draw, address, count):
    """Bytes that are no protocol at all."""
    host, _, port = address.rpartition(":")
    for _ in range(count):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            try:
                connection.sendall(draw.choice((b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")))
                connection.sendall(draw.randbytes(draw.randint(1, 4000)))
            except OSError:
                continue  # it hung up


def test_tickets_are_refused_or_answered_rightly_and_memory_stays_flat(written):
    draw = random.Random(20_261_123)
    plan = make_plan(written.manifest, "train", small_order())
    told = Counter()
    resident = []
    with (
        control_process(written.uri) as (_, control_address),
        worker_process(written.uri, control_address) as (process, address),
        raw_worker(address) as worker,
        raw_worker(address, None) as stranger,
    ):
        garbage_to(draw, address, 50)
        for number, data in enumerate(tickets(draw, plan, TICKETS)):
            expected = expected_answer(data, written.manifest)
            try:
                table = worker.table(data)
            except flight.FlightServerError as error:
                assert expected is None, data
                told[json.loads(error.extra_info)["kind"]] += 1
            else:
                assert expected is not None, data
                told["answered"] += 1
                ticket, rows = expected
                assert table["row_id"].to_pylist() == rows.row_id.tolist()
                for at in range(0, table.num_rows, 1 + table.num_rows // 3):
                    row = written.row(ticket.plan, table["row_id"][at].as_py())
                    assert table["tokens"][at].as_py() == row.tokens.tolist()
                    assert table["row_crc"][at].as_py() == row.crc
            if number % 50 == 0:
                with pytest.raises(flight.FlightUnauthenticatedError):
                    stranger.table(data)
            if number % 500 == 499:
                resident.append(psutil.Process(process.pid).memory_info().rss)
        assert process.poll() is None
        for first in range(0, plan.num_batches, 7):
            ticket = Ticket(plan, first, first + 1, (0, GLOBAL_BATCH))
            table = worker.table(ticket)
            crcs = [written.row(plan, row_id).crc for row_id in table["row_id"].to_pylist()]
            assert table["row_crc"].to_pylist() == crcs
            assert table.num_rows == GLOBAL_BATCH
    assert told["ValueError"] > TICKETS // 2
    assert told["CursorMismatchError"] > 20
    assert told["answered"] > 100
    third = len(resident) // 3
    assert max(resident[2 * third :]) - max(resident[:third]) < GROWTH_BYTES, resident


def messages(draw, written):
    """A method, and bytes to send it."""
    order = json.loads(small_order().to_json())
    for _ in range(CONTROL_MESSAGES):
        method = draw.choice(METHODS)
        odd_text = draw.choice(("", "x", "é" * 200, "\x00", "w1", "127.0.0.1:1", "x" * 5000, written.manifest.digest))
        worker = pb.RegisterRequest(
            worker_id=draw.choice((f"w{draw.randrange(10**6)}", odd_text)),
            address=draw.choice((f"127.0.0.1:{draw.randrange(70_000)}", odd_text)),
            dataset_digest=draw.choice((written.manifest.digest, odd_text)),
        )
        plan = pb.GetPlanRequest(
            split=draw.choice(("train", "train", "eval", odd_text)),
            order_json=draw.choice((json.dumps(order), json.dumps(with_odd_values(draw, order)), odd_text)),
            dataset_digest=draw.choice((written.manifest.digest, written.manifest.digest, odd_text)),
        )
        counters = pb.WorkerCounters(tickets=draw.randrange(2**64), errors=draw.randrange(2**64))
        good = {
            "Register": worker,
            "Heartbeat": pb.HeartbeatRequest(worker_id=worker.worker_id, counters=counters),
            "Leave": pb.LeaveRequest(worker_id=worker.worker_id),
            "GetPlan": plan,
            "ReportFailure": pb.ReportFailureRequest(worker_id=worker.worker_id, reason=odd_text),
        }.get(method, pb.StatsRequest())
        data = good.SerializeToString()
        how = draw.random()
        if how < 0.4:
            yield method, with_other_bytes(draw, data)
        elif how < 0.5:
            yield method, draw.randbytes(draw.choice((1, 30, 3000)))
        elif how < 0.51:
            yield method, b"\x0a\xff\xff\xff\x7f" + b"x" * draw.choice((100, 300_000))
        else:
            yield method, data


def test_control_messages_are_refused_or_answered_and_memory_stays_flat(written):
    draw = random.Random(20_261_124)
    told = Counter()
    resident = []
    answers = {method: getattr(pb, f"{method}Response") for method in METHODS}
    with (
        control_process(written.uri) as (process, address),
        raw_control(address) as control,
        raw_control(address, None) as stranger,
    ):
        garbage_to(draw, address, 50)
        calls = {
            (raw, method): raw.channel.unary_unary(f"/stormjib.data.v2.DataControl/{method}")
            for raw in (control, stranger)
            for method in METHODS
        }
        for number, (method, data) in enumerate(messages(draw, written)):
            try:
                answer = calls[control, method](data, timeout=20, metadata=control.metadata)
            except grpc.RpcError as error:
                told[error.code()] += 1
                if error.code() not in REFUSALS:
                    pytest.fail(f"{method} {data!r}: {error.code()}, {error.details()}")
            else:
                parsed = answers[method].FromString(answer)
                told["answered"] += 1
                if method == "GetPlan":
                    assert json.loads(parsed.plan_json)["dataset_digest"] == written.manifest.digest
            if number % 50 == 0:
                with pytest.raises(grpc.RpcError) as caught:
                    calls[stranger, method](data, timeout=20)
                too_large = len(data) > MAX_MESSAGE_BYTES  # nobody parses it, or looks for the token
                refusal = grpc.StatusCode.RESOURCE_EXHAUSTED if too_large else grpc.StatusCode.UNAUTHENTICATED
                assert caught.value.code() == refusal, (method, data[:200])
                told["stranger", caught.value.code()] += 1
            if number % 400 == 399:
                resident.append(psutil.Process(process.pid).memory_info().rss)
        for service, method in (
            ("grpc.health.v1.Health", "Check"),
            ("grpc.health.v1.Health", "Watch"),
            ("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"),
        ):
            for _ in range(50):
                call = control.channel.stream_stream(f"/{service}/{method}")
                with pytest.raises(grpc.RpcError) as caught:
                    list(call(iter([b"\xff" + draw.randbytes(20)]), timeout=20, metadata=control.metadata))
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert process.poll() is None
        for split in ("train", "eval"):
            request = pb.GetPlanRequest(
                split=split, order_json=small_order().to_json(), dataset_digest=written.manifest.digest
            )
            plan = make_plan(written.manifest, split, small_order())
            assert control("GetPlan", request).plan_json == plan.to_json()
    for code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ):
        assert told[code] > 5, told
    assert told["answered"] > CONTROL_MESSAGES // 4
    assert told["stranger", grpc.StatusCode.UNAUTHENTICATED] > 50
    third = len(resident) // 3
    assert max(resident[2 * third :]) - max(resident[:third]) < GROWTH_BYTES, resident
