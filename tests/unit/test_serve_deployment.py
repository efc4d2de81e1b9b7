import socket

import pytest

from data_service.errors import ConfigError
from serve.deployment import _check_port, _free_port


def test_a_taken_port_is_the_users_mistake_and_names_the_way_out() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"serve\.port=0"):
            _check_port("127.0.0.1", other.getsockname()[1])


def test_a_chosen_port_is_free() -> None:
    port = _free_port("127.0.0.1")
    _check_port("127.0.0.1", port)
    assert port > 0
