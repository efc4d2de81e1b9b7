"""The servers of the data service over real gRPC and Flight: right rows for any member, nothing wrong handed on."""

import json
import random
import threading
import time
from dataclasses import replace

import grpc
import numpy as np
import pyarrow.flight as flight
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from data_service import control_pb2 as pb
from data_service.order import rows_of_batch
from data_service.plan import OrderSpec
from data_service.planning import make_plan
from data_service.signs import PING, store_silence
from data_service.ticket import MAX_TICKET_BYTES, Ticket
from tests.helpers.data_runs import GLOBAL_BATCH, running_service, small_order
from tests.helpers.flight_calls import raw_control, raw_worker
from tests.helpers.written_datasets import WrittenPart, random_documents, stream_dataset, write_dataset

MEMBERS = ("a", "b", "c")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("stream") / "d")


@pytest.fixture(scope="module")
def plan(written):
    return make_plan(written.manifest, "train", small_order())


@pytest.fixture(scope="module")
def service(written):
    with running_service(written.uri, small_order()) as running:
        yield running


@pytest.fixture
def worker(service):
    with raw_worker(service.workers[0]) as raw:
        yield raw


def chats(folder):
    """A dataset of document rows with answers and classes."""
    draw = np.random.default_rng(5)
    documents = random_documents(3, 6000, longest=33)
    part = WrittenPart(
        "chats",
        documents,
        labels=draw.integers(-1, 2, len(documents)).tolist(),
        answers=[draw.integers(0, 2, one.size).astype(bool) for one in documents],
    )
    held_out = replace(part, documents=documents[:9], labels=part.labels[:9], answers=part.answers[:9])
    return write_dataset(
        folder, {"train": [part], "eval": [held_out]}, rows="document", seq_len=32, labels=("x", "y"), loss_masks=True
    )


def assert_rows(table, written, plan, ticket):
    """Each row of an answer is the one that the plan has there, byte for byte; returns (batch, slot) of each."""
    places = list(zip(table["batch"].to_pylist(), table["slot"].to_pylist(), strict=True))
    wanted = {step: rows_of_batch(plan, step).tolist() for step in range(ticket.first, ticket.last)}
    columns = table.to_pydict()
    for at, (batch, slot) in enumerate(places):
        row_id = wanted[batch][slot]
        row = written.row(plan, row_id)
        assert columns["row_id"][at] == row_id
        assert columns["length"][at] == row.length
        assert columns["row_crc"][at] == row.crc
        np.testing.assert_array_equal(columns["tokens"][at], row.tokens)
        np.testing.assert_array_equal(columns["starts"][at], row.starts)
        assert columns.get("answer_bits", [b""] * len(places))[at] == row.answer_bits
        assert columns.get("label", [None] * len(places))[at] == row.label
    return places


def test_the_members_tickets_give_every_row_once_and_each_as_it_was_written(written, plan, worker):
    # Behind the end of the first epoch, so that rows of two epochs are among them.
    first = plan.num_batches - 3
    whole = Ticket(plan, first, first + 6, (1, GLOBAL_BATCH))
    expected = assert_rows(worker.table(whole), written, plan, whole)
    assert expected == [(batch, slot) for batch in range(first, first + 6) for slot in range(1, GLOBAL_BATCH)]
    shares = [replace(whole, members=MEMBERS, member=member) for member in range(3)]
    found = [assert_rows(worker.table(share), written, plan, share) for share in shares]
    assert sorted(place for share in found for place in share) == expected
    assert all(share == sorted(share) and share for share in found)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_of_documents_carry_their_answers_and_classes(tmp_path, split):
    written = chats(tmp_path / "d")
    order = small_order()
    plan = make_plan(written.manifest, split, order)
    with running_service(written.uri, order) as service, raw_worker(service.workers[0]) as worker:
        ticket = Ticket(plan, 0, plan.num_batches, (0, GLOBAL_BATCH))
        places = assert_rows(worker.table(ticket), written, plan, ticket)
    assert len(places) == (plan.num_rows if split == "eval" else plan.num_batches * GLOBAL_BATCH)


def test_an_answer_travels_in_messages_of_about_two_mebibytes(written, worker):
    plan = make_plan(written.manifest, "train", small_order(global_batch=32_768))
    messages = worker.batches(Ticket(plan, 3, 5, (0, 30_000)))
    assert sum(message.num_rows for message in messages) == 60_000
    sizes = [message.num_rows * 33 * 2 for message in messages]
    assert len(sizes) == 2
    assert all(0.99 * 2**21 < size <= 2**21 for size in sizes[:-1])
    slots = np.concatenate([message["slot"].to_numpy() for message in messages])
    np.testing.assert_array_equal(slots, np.tile(np.arange(30_000), 2))


def test_a_member_without_rows_answers_with_none(plan, worker):
    shares = [Ticket(plan, 5, 6, (0, 1), MEMBERS, member) for member in range(3)]
    assert sorted(worker.table(share).num_rows for share in shares) == [0, 0, 1]


def test_a_ticket_for_one_slot_of_a_huge_batch_costs_one_row(written, worker):
    plan = make_plan(written.manifest, "train", small_order(global_batch=2**30))
    started = time.monotonic()
    assert worker.table(Ticket(plan, 5, 6, (2**29, 2**29 + 1))).num_rows == 1
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("damage", ["bit", "gone", "short"])
def test_a_damaged_shard_is_named_and_never_served(tmp_path, damage):
    written = stream_dataset(tmp_path / "d")
    plan = make_plan(written.manifest, "train", small_order())
    shard = tmp_path / "d" / "shards" / "train-00002.arrow"
    data = bytearray(shard.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "short":
        shard.write_bytes(data[: len(data) // 2])
    else:
        shard.unlink()
    per_shard = plan.parts[0].rows_per_shard
    bad, served = 0, set()
    with running_service(written.uri, small_order()) as service, raw_worker(service.workers[0]) as worker:
        for step in range(plan.num_batches):
            ids = rows_of_batch(plan, step)
            try:
                served.update(worker.table(Ticket(plan, step, step + 1, (0, GLOBAL_BATCH)))["row_id"].to_pylist())
            except flight.FlightServerError as error:
                told = json.loads(error.extra_info)
                assert told["kind"] == "ShardCorruptError"
                assert "train-00002.arrow" in told["message"]
                assert any(row // per_shard == 2 for row in ids.tolist())
                bad += 1
    assert bad > 0
    assert served
    assert not [row for row in served if row >> 48 == 0 and row // per_shard == 2]


def test_callers_without_the_token_are_unauthenticated_on_both_planes(service, plan):
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    for token in (None, "wrong"):
        with raw_control(service.control, token) as control:
            for method, request in (
                ("GetPlan", pb.GetPlanRequest(split="train")),
                ("Members", pb.MembersRequest()),
                ("Stats", pb.StatsRequest()),
                ("Register", pb.RegisterRequest(worker_id="x", address="y:1")),
                ("Heartbeat", pb.HeartbeatRequest(worker_id="x")),
                ("Leave", pb.LeaveRequest(worker_id="x")),
                ("ReportFailure", pb.ReportFailureRequest(worker_id="x")),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    control(method, request)
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            asking = reflection_pb2_grpc.ServerReflectionStub(control.channel).ServerReflectionInfo
            with pytest.raises(grpc.RpcError) as caught:
                list(asking(iter([listing]), timeout=5, metadata=control.metadata))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with raw_worker(service.workers[0], token) as worker:
            for call in (
                lambda worker=worker: worker.table(Ticket(plan, 0, 1, (0, 1))),
                lambda worker=worker: list(worker.client.do_action(flight.Action(PING, b""), worker.options)),
                lambda worker=worker: list(worker.client.list_flights(options=worker.options)),
                lambda worker=worker: worker.client.get_flight_info(
                    flight.FlightDescriptor.for_command(b"x"), worker.options
                ),
            ):
                with pytest.raises(flight.FlightUnauthenticatedError):
                    call()


def test_bad_tickets_are_refused_and_the_worker_lives(plan, worker):
    good = json.loads(Ticket(plan, 0, 1, (0, 1)).to_bytes())
    of_plan = good["plan"]
    part = of_plan["parts"][0]
    bad = [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[" * 3000,
        b"x" * (MAX_TICKET_BYTES + 1),
        *(
            json.dumps({**good, **change}).encode()
            for change in (
                {"first": -1},
                {"last": 0},
                {"last": 10**9},
                {"first": 2**62 - 1, "last": 2**62},
                {"slots": [0, GLOBAL_BATCH + 1]},
                {"slots": [True, 2]},
                {"v": 1},
                {"member": 1},
                {"members": ["b", "a"]},
                {"members": ["a", "a"]},
                {"members": [str(number).zfill(9) for number in range(257)]},
                {"extra": 1},
                *(
                    {"plan": {**of_plan, **plan_change}}
                    for plan_change in (
                        {"dataset_digest": "other"},
                        {"seq_len": 10**9},
                        {"seq_len": 31},
                        {"version": 9},
                        {"window_shards": 2**61},
                        {"rows": "document"},
                        {"loss_masks": True},
                        {"num_labels": 3},
                        {"parts": [{**part, "num_rows": 1}]},
                        {"parts": of_plan["parts"][::-1]},
                        {"parts": [{**part, "rows_per_shard": 2**31}, *of_plan["parts"][1:]]},
                        {"segments": []},
                    )
                ),
            )
        ),
    ]
    for ticket in bad:
        with pytest.raises(flight.FlightServerError) as caught:
            worker.table(ticket)
        assert json.loads(caught.value.extra_info)["kind"] in ("ValueError", "CursorMismatchError")
    with pytest.raises(flight.FlightServerError, match="is none of this worker's"):
        list(worker.client.do_action(flight.Action("other", b""), worker.options))
    (pong,) = worker.client.do_action(flight.Action(PING, b""), worker.options)
    assert store_silence(pong.body.to_pybytes()) is None
    assert worker.table(Ticket(plan, 0, 1, (0, 1))).num_rows == 1


def test_many_runs_read_at_once(written, service):
    """Tickets of several orders from several threads, on one worker."""
    orders = [OrderSpec(seed, 32, GLOBAL_BATCH, 3) for seed in range(4)]
    plans = [make_plan(written.manifest, "train", order) for order in orders]
    problems = []

    def read(number):
        draw = random.Random(number)
        try:
            with raw_worker(service.workers[0]) as worker:
                for _ in range(15):
                    plan, first = draw.choice(plans), draw.randrange(200)
                    ticket = Ticket(plan, first, first + 2, (0, 4))
                    assert_rows(worker.table(ticket), written, plan, ticket)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
