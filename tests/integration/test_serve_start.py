"""What `deploy` refuses and gives up, and that nothing of it stays."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions

from data_service.errors import ConfigError
from serve.config import ServeConfig
from serve.deployment import deploy, undeploy
from serve.errors import ServeError
from serve.preflight import free_port
from serve.spec import ServeSpec
from tests.helpers.tiny_model import make_model_folder

pytestmark = pytest.mark.timeout(180)
TOO_MANY_CPUS = 50.0


def other_application() -> Any:
    """Another application of the cluster; a local class travels by value, so that its replica imports no test."""

    @ray_serve.deployment(ray_actor_options={"num_cpus": 0})
    class Other:
        """Answers."""

        def __call__(self) -> str:
            return "other"

    return Other.bind()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def connected() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="sj") as short:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _temp_dir=short,
        )
        try:
            yield
        finally:
            ray.shutdown()


def nothing_is_left() -> bool:
    """Ray Serve names its controller, its proxies and all replicas."""
    return ray.util.list_named_actors(all_namespaces=True) == []


def test_replicas_that_fit_nowhere_are_given_up_with_the_reason(model: str) -> None:
    spec = ServeSpec(model, "tiny", config=ServeConfig(port=0, cpus_per_replica=TOO_MANY_CPUS))
    with pytest.raises(ServeError) as failed:
        deploy(spec, deadline_s=3)
    text = str(failed.value)
    for part in ("did not run within 3 s", "Engine is UPDATING", "STARTING", "serve.cpus_per_replica=50"):
        assert part in text
    assert nothing_is_left()


def test_an_interrupt_while_it_starts_leaves_nothing(model: str) -> None:
    spec = ServeSpec(model, "tiny", config=ServeConfig(port=0, cpus_per_replica=TOO_MANY_CPUS))

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            actors = ray.util.list_named_actors(all_namespaces=True)
            if any(spec.app_name in str(actor["name"]) for actor in actors):
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    # a process that a shell started in the background ignores SIGINT, and so would this one
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            deploy(spec, deadline_s=100)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert nothing_is_left()


def test_a_proxy_that_is_open_to_others_needs_a_key(model: str) -> None:
    port = free_port("0.0.0.0")
    ray_serve.start(http_options=HTTPOptions(host="0.0.0.0", port=port))
    try:
        with pytest.raises(ConfigError, match=rf"listens on 0\.0\.0\.0:{port}.*serve\.api_key_env is not set"):
            deploy(ServeSpec(model, "tiny", config=ServeConfig(port=0)))
    finally:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]


def test_other_applications_are_neither_replaced_nor_ended(model: str, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port("127.0.0.1")
    ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    spec = ServeSpec(model, "tiny", config=ServeConfig(port=8000))
    try:
        ray_serve.run(other_application(), name="theirs", route_prefix="/")
        with pytest.raises(ConfigError, match=r"application 'theirs' holds the route /"):
            deploy(spec)
        assert set(ray_serve.status().applications) == {"theirs"}

        ray_serve.run(other_application(), name="theirs", route_prefix="/theirs")
        endpoint = deploy(spec)
        assert endpoint.url == f"http://127.0.0.1:{port}"
        assert f"listens on 127.0.0.1:{port}" in caplog.text
        assert set(ray_serve.status().applications) == {"theirs", spec.app_name}
        undeploy(endpoint)
        assert set(ray_serve.status().applications) == {"theirs"}
        ray_serve.delete("theirs")
        undeploy(endpoint)
        assert ray_serve.status().proxies, "a Ray Serve that was there before goes on"
    finally:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
