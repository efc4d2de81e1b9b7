"""What a rank makes of the answers it gets before it trains."""

from typing import Any, cast

import pytest

from data_service.errors import ConfigError, EmptySplitError
from tests.helpers.made_rows import MadeRows
from trainer.worker import _has_rows


class _Refusing:
    """A row source that has no plan."""

    def __init__(self, error: ConfigError) -> None:
        self._error = error

    def plan(self, split: str) -> Any:
        raise self._error


def test_only_an_empty_split_means_that_there_is_nothing_to_evaluate_on() -> None:
    rows = MadeRows(4, 8, 32)
    assert _has_rows(rows, "train")
    assert not _has_rows(rows, "eval")
    assert not _has_rows(cast(Any, _Refusing(EmptySplitError("none"))), "eval")
    with pytest.raises(ConfigError, match="another dataset"):
        _has_rows(cast(Any, _Refusing(ConfigError("another dataset"))), "eval")
