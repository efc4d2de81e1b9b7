"""What a rank says when something goes wrong, and what ranks must not do."""

import ipaddress
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.rank_programs import (
    leave_no_traces,
    rank_1_freezes,
    rank_1_is_killed,
    train_and_tell_where_it_listens,
    train_on_different_rows,
)
from tests.helpers.ranks import RanksFailedError, specs_of
from tests.helpers.row_service import row_service
from tests.ranks.conftest import GLOBAL_BATCH, HALF, SEED, SEQ_LEN, STEPS, Case, Lab
from trainer.protocol import WorkerSpec


def _changed(spec: WorkerSpec, **sections: dict[str, object]) -> WorkerSpec:
    """The same specification with some keys of `train` changed."""
    values = spec.train.model_dump()
    for name, keys in sections.items():
        values[name] = {**values[name], **keys}
    return replace(spec, train=type(spec.train).model_validate(values))


def test_a_killed_rank_is_named_by_the_others(lab: Lab) -> None:
    spec = lab.spec(Case(2, 1), lab.folder / "killed")
    with pytest.raises(RanksFailedError) as caught:
        lab.server.run(rank_1_is_killed, specs_of(spec))
    assert "WorkerLostError" in caught.value.failures[0]


@pytest.mark.parametrize("case", [Case(2, 1), Case(1, 2)], ids=str)
def test_a_frozen_rank_ends_the_others_in_time(lab: Lab, case: Case) -> None:
    spec = lab.spec(case, lab.folder / f"frozen-{case}")
    spec = replace(spec, train=spec.train.model_copy(update={"collective_timeout_s": 3.0}))
    with pytest.raises(RanksFailedError) as caught:
        lab.server.run(rank_1_freezes, specs_of(spec), deadline_s=30.0)
    assert "CollectiveTimeoutError" in caught.value.failures[0]
    assert "collective_timeout_s=3" in caught.value.failures[0]


def test_stages_that_were_given_different_rows_refuse(lab: Lab) -> None:
    spec = lab.spec(Case(1, 2), lab.folder / "tampered")
    with pytest.raises(RanksFailedError) as caught:
        lab.server.run(train_on_different_rows, specs_of(spec))
    story = next(iter(caught.value.failures.values()))
    assert "DeliveryError" in story
    assert "Step 3: pipeline 0 was given different rows" in story


def test_a_loss_that_is_no_number_ends_every_rank(lab: Lab) -> None:
    spec = _changed(lab.spec(Case(2, 1), lab.folder / "nan"), optimizer={"lr": 1e30}, schedule={"warmup_steps": 0})
    with pytest.raises(RanksFailedError) as caught:
        lab.server.run(lab.program, specs_of(spec))
    assert "NonFiniteLossError" in next(iter(caught.value.failures.values()))


def test_a_checkpoint_of_another_order_of_rows_is_refused(lab: Lab) -> None:
    lab.reference(Case(1, 1))
    with row_service(lab.folder, SEQ_LEN, GLOBAL_BATCH, SEED + 1) as other:
        spec = replace(lab.spec(Case(1, 1), lab.checkpoints(Case(1, 1)), resume_step=HALF), data=other.access)
        with pytest.raises(RanksFailedError) as caught:
            lab.server.run(lab.program, specs_of(spec))
    assert "CursorMismatchError" in caught.value.failures[0]


def test_a_checkpoint_of_another_model_is_refused(lab: Lab) -> None:
    lab.reference(Case(1, 1))
    spec = lab.spec(Case(1, 1), lab.checkpoints(Case(1, 1)), resume_step=HALF)
    spec = replace(spec, model=spec.model.model_copy(update={"num_layers": 3}))
    with pytest.raises(RanksFailedError) as caught:
        lab.server.run(lab.program, specs_of(spec))
    assert "holds another model than the `model` section describes" in caught.value.failures[0]


def test_ranks_compile_nothing_and_say_nothing(lab: Lab, tmp_path: Path) -> None:
    program = partial(leave_no_traces, extensions=str(tmp_path / "extensions"))
    outcome = lab.server.run(program, specs_of(lab.spec(Case(2, 2), tmp_path)))
    assert [outcome.returned[rank] for rank in range(4)] == [[]] * 4
    assert not (tmp_path / "extensions").exists()
    for log in outcome.logs:
        assert log.read_text() == ""


def test_ranks_are_not_told_where_the_data_lie(lab: Lab) -> None:
    """What they are given names neither the dataset nor its source, and what they report leaves the section open."""
    with row_service(lab.folder, SEQ_LEN, GLOBAL_BATCH, SEED) as service:
        paths = [service.dataset, service.dataset.parent / "corpus.csv"]
        specs = specs_of(replace(lab.spec(Case(2, 2), lab.folder / "told"), data=service.access))
    assert all(path.exists() for path in paths)
    assert [path for path in paths for spec in specs if str(path) in spec.to_json()] == []
    (state,) = [part.state for part in lab.reference(Case(1, 1)).parts[STEPS] if part.state is not None]
    assert state.config == {}


@pytest.mark.parametrize("case", [Case(2, 1), Case(1, 2)], ids=str)
def test_ranks_of_one_machine_listen_on_loopback_only(lab: Lab, case: Case) -> None:
    """The store has no password, and whoever reaches a gloo socket can stop the run."""
    spec = lab.spec(case, lab.folder / f"listening-{case}", steps=5)
    outcome = lab.server.run(train_and_tell_where_it_listens, specs_of(spec))
    for rank in range(2):
        addresses = outcome.returned[rank]
        assert addresses, f"rank {rank} was not looked at: gloo and the store listen while it trains"
        assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses


def test_a_store_that_cannot_be_opened_is_named(lab: Lab) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        spec = replace(lab.spec(Case(1, 1), lab.folder / "taken"), master_port=taken.getsockname()[1])
        with pytest.raises(RanksFailedError) as caught:
            lab.server.run(lab.program, [spec])
    assert "WorkerLostError: Rank 0 cannot open its store at 127.0.0.1" in caught.value.failures[0]
