"""The trainer's errors: the drawn tree is the real one, and they survive a process boundary."""

import pickle

import pytest

import trainer.errors
from data_service.errors import StormjibError


@pytest.mark.parametrize("name", trainer.errors.__all__)
def test_errors_survive_pickling_and_are_in_the_drawn_tree(name: str) -> None:
    kind = getattr(trainer.errors, name)
    assert issubclass(kind, StormjibError)
    assert name in str(trainer.errors.__doc__)
    error = pickle.loads(pickle.dumps(kind("train.x=1: found 2. Set 3.")))
    assert type(error) is kind
    assert str(error) == "train.x=1: found 2. Set 3."


def test_only_losses_of_processes_and_failures_of_stores_are_retried() -> None:
    retried = {name for name in trainer.errors.__all__ if getattr(trainer.errors, name).retryable}
    assert retried == {"WorkerLostError", "CollectiveTimeoutError", "SaveFailedError"}
