"""The endpoint on Ray Serve: two deployments, and their start and stop.

Owns everything that spells Ray Serve: options, handles, HTTP proxy. The caller has connected to Ray before.
"""

import asyncio
import contextlib
import http.client
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any
from urllib.parse import urlsplit

from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from data_service.errors import ConfigError
from serve.config import ServeConfig
from serve.engine.messages import Delta, EngineRequest, EngineStats
from serve.engine_deployment import Engine
from serve.errors import ModelNotReadyError, ServeError
from serve.ingress import build_app, key_digest
from serve.model_folder import read_model_folder
from serve.spec import Endpoint, ServeSpec

__all__ = ["APP_NAME", "HandlePort", "Ingress", "application", "deploy", "engine_stats", "undeploy"]

_LOG = logging.getLogger(__name__)
APP_NAME = "stormjib"
_ENGINE = "Engine"
_READY_S = 60.0
_PROBE_S = 5.0
_GRACE_S = 30.0
"""How long a stopping replica may finish its streams."""
_ONE_LOOP = {
    "env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
}
"""Replicas run our coroutines in Ray Serve's own loop: nothing in them blocks, and a message that need not change
threads cost about a third less CPU (8 streams, Ray 2.60)."""


class HandlePort:
    """The engine behind a Ray Serve handle; implements `serve.ingress.EnginePort`."""

    def __init__(self, handle: Any) -> None:
        """Take the handle of the Engine deployment (Ray Serve has no types)."""
        self._handle = handle
        self._stream = handle.options(method_name="stream", stream=True)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Delta]]:
        """Deltas of a request; closing this aborts it in the replica."""
        response = self._stream.remote(request)
        try:
            with _as_serve_errors():
                async for item in response:
                    if isinstance(item, ServeError):
                        raise item
                    yield item
        finally:
            response.cancel()

    async def complete(self, request: EngineRequest) -> list[Delta]:
        """All deltas of a request; cancelling this aborts it in the replica."""
        response = self._handle.complete.remote(request)
        try:
            with _as_serve_errors():
                answer = await response
        finally:
            response.cancel()
        if isinstance(answer, ServeError):
            raise answer
        deltas: list[Delta] = answer
        return deltas

    async def ready(self) -> None:
        """Returns when a replica answers."""
        try:
            with _as_serve_errors():
                await asyncio.wait_for(self._handle.stats.remote(), _PROBE_S)
        except TimeoutError as cause:
            raise ModelNotReadyError(f"no engine replica answered within {_PROBE_S:g} s. Try again later.") from cause


class Ingress:
    """One replica of the API; Ray Serve calls `__serve_build_asgi_app__` after the constructor."""

    def __init__(self, spec: ServeSpec, key: bytes | None, engine: Any) -> None:
        """Read the tokenizer.

        Args:
            spec: what is served.
            key: digest of the bearer key.
            engine: handle of the Engine deployment.
        """
        self._app = build_app(
            HandlePort(engine), read_model_folder(spec.model_uri), spec.model_name, spec.fingerprint, key
        )

    def __serve_build_asgi_app__(self) -> Starlette:  # noqa: PLW3201  (a name that Ray Serve looks for)
        """The application."""
        return self._app


def deploy(spec: ServeSpec) -> Endpoint:
    """Start, or update, the endpoint on the connected Ray; returns when it answers.

    Raises:
        ConfigError: the model folder cannot be served, the port is taken, or the key's variable is not set.
        ServeError: the replicas did not come up.
    """
    read_model_folder(spec.model_uri)  # fails early, with the user's message
    key = _read_key(spec.config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = _running_http()
    if running is None:
        host, port = spec.config.host, spec.config.port or _free_port(spec.config.host)
        _check_port(host, port)
        ray_serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=host, port=port),
            logging_config=_logging(),
        )
    else:
        host, port = running
    try:
        ray_serve.run(_application(spec, key), name=APP_NAME, route_prefix="/", blocking=False)
    except (RuntimeError, RayError, RayServeException) as cause:
        raise ServeError(
            f"the replicas that serve {spec.model_uri} did not start: {cause} "
            "See the replica's log in the Ray session's logs/serve folder."
        ) from cause
    address = "127.0.0.1" if host in ("0.0.0.0", "localhost") else host
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    _wait_ready(url)
    return Endpoint(url, spec.model_name, spec.fingerprint)


def application(spec: ServeSpec) -> Any:
    """The Serve application of a model, for whoever starts applications other than `deploy`; Ray need not run yet.

    Raises:
        ConfigError: the model folder cannot be served, or the key's variable is not set.
    """
    read_model_folder(spec.model_uri)
    return _application(spec, _read_key(spec.config))


def undeploy(*, keep_serve: bool = False) -> None:
    """Stop the endpoint. None there is fine.

    Args:
        keep_serve: leave Ray Serve itself running, as where the whole cluster ends next; otherwise it is shut down,
            unless it runs other applications.
    """
    if _running_http() is None:
        return
    if not keep_serve and set(ray_serve.status().applications) <= {APP_NAME}:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
    else:
        ray_serve.delete(APP_NAME)


def engine_stats() -> EngineStats:
    """Load of one engine replica (with several: of one of them)."""
    stats: EngineStats = ray_serve.get_deployment_handle(_ENGINE, APP_NAME).stats.remote().result(timeout_s=_PROBE_S)
    return stats


def _application(spec: ServeSpec, key: bytes | None) -> Any:
    config = spec.config
    fixed = config.replicas.min == config.replicas.max
    engine = ray_serve.deployment(
        name=_ENGINE,
        num_replicas=config.replicas.min if fixed else None,
        autoscaling_config=None
        if fixed
        else AutoscalingConfig(
            min_replicas=config.replicas.min,
            max_replicas=config.replicas.max,
            target_ongoing_requests=float(config.max_num_seqs),
        ),
        # the engine refuses what exceeds its queue; Ray Serve must not hold requests back before that
        max_ongoing_requests=config.max_num_seqs + config.max_queue + 64,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=_GRACE_S,
        health_check_period_s=5.0,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "runtime_env": _ONE_LOOP,
        },
        logging_config=_logging(),
    )(Engine)
    ingress = ray_serve.deployment(
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=10_000,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=_GRACE_S,
        ray_actor_options={"num_cpus": 0, "runtime_env": _ONE_LOOP},
        logging_config=_logging(),
    )(ray_serve.ingress()(Ingress))
    return ingress.bind(spec, key, engine.bind(spec))


def _logging() -> LoggingConfig:
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


@contextlib.contextmanager
def _as_serve_errors() -> Iterator[None]:
    """Turn what Ray raises about a lost or missing replica into an error with a status."""
    try:
        yield
    except (RayError, RayServeException) as cause:
        _LOG.warning("the engine did not answer: %s", cause)
        raise ModelNotReadyError("the engine replica was lost or is not there yet. Try again.") from cause


def _read_key(config: ServeConfig) -> bytes | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ConfigError(
            f"serve.api_key_env={config.api_key_env}, but that environment variable is not set. "
            "Set it to the key that clients must send."
        )
    return key_digest(key)


def _running_http() -> tuple[str, int] | None:
    """Where the HTTP proxy of a Ray Serve that runs already listens; None where none runs.

    Ray 2.60 tells this only through its private client.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options = client.http_config
    return options.host, options.port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _free_port(host: str) -> int:
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _check_port(host: str, port: int) -> None:
    """Fail early where the port is taken on this machine; elsewhere the proxy itself would fail."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as cause:
            raise ConfigError(
                f"serve.host={host} serve.port={port} cannot be listened on ({cause.strerror}). "
                "Set another serve.port, or serve.port=0 for a free one."
            ) from cause


def _wait_ready(url: str) -> None:
    """Poll `/readyz` until it answers 200."""
    place = urlsplit(url)
    deadline = time.monotonic() + _READY_S
    last = "no answer"
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=_PROBE_S + 1)
        try:
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            if answer.status == 200:
                return
            last = f"status {answer.status}: {answer.read(300)!r}"
        except OSError as cause:
            last = str(cause)
        finally:
            connection.close()
        time.sleep(0.1)
    raise ModelNotReadyError(
        f"{url}/readyz was not ready within {_READY_S:g} s ({last}). See the Ray session's logs/serve."
    )
