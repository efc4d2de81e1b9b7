import socket

import pytest

from data_service.errors import ConfigError
from serve.config import ServeConfig
from serve.preflight import check_deployable, check_port, free_port, url_of
from serve.spec import ServeSpec


def test_a_taken_port_is_the_users_mistake_and_names_the_way_out() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"serve\.port=0"):
            check_port("127.0.0.1", other.getsockname()[1])


def test_a_chosen_port_is_free() -> None:
    port = free_port("127.0.0.1")
    check_port("127.0.0.1", port)
    assert port > 0


def test_a_taken_port_is_known_before_a_training_where_the_proxy_is_local() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = ServeConfig(port=other.getsockname()[1])
        with pytest.raises(ConfigError, match=r"serve\.port="):
            check_deployable(config, local=True)
        check_deployable(config, local=False)
    check_deployable(ServeConfig(port=0), local=True)


def test_a_missing_key_is_known_before_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORMJIB_TEST_KEY", raising=False)
    config = ServeConfig(port=0, api_key_env="STORMJIB_TEST_KEY")
    with pytest.raises(ConfigError, match="STORMJIB_TEST_KEY"):
        check_deployable(config, local=False)
    monkeypatch.setenv("STORMJIB_TEST_KEY", "key")
    check_deployable(config, local=False)


def test_an_application_is_named_after_its_run() -> None:
    first, second = (ServeSpec(f"/runs/small/export/step_0000000{step}", "small model") for step in (4, 8))
    assert first.app_name == second.app_name
    assert first.app_name.startswith("stormjib-small-model-")
    assert ServeSpec("/other/small/export/step_00000004", "small model").app_name != first.app_name


def test_a_proxy_on_all_addresses_is_reached_by_loopback() -> None:
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url_of("::", 80) == "http://[::1]:80"
    assert url_of("10.0.0.1", 80) == "http://10.0.0.1:80"
