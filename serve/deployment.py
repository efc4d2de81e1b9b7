"""The endpoint on Ray Serve: two deployments, and their start and stop.

Owns everything that spells Ray Serve: options, handles, HTTP proxy. The caller has connected to Ray before.
"""

import asyncio
import contextlib
import http.client
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig
from starlette.applications import Starlette

from data_service.errors import ConfigError
from data_service.storage import s3_environment
from serve.config import is_loopback
from serve.engine.messages import Delta, EngineRequest, EngineStats
from serve.engine_deployment import Engine
from serve.errors import ModelNotReadyError, ServeError
from serve.ingress import build_app
from serve.model_folder import read_model_folder
from serve.preflight import check_port, free_port, read_key, url_of
from serve.spec import Endpoint, ServeSpec

__all__ = ["DEPLOY_S", "HandlePort", "Ingress", "application", "deploy", "engine_stats", "undeploy"]

_LOG = logging.getLogger(__name__)
DEPLOY_S = 600.0
"""The replicas of an endpoint must run within this time: a large model has to be loaded, a node may have to come up."""
_ROUTE = "/"
_POLL_S = 0.2
_ENGINE = "Engine"
_READY_S = 60.0
_PROBE_S = 5.0
_GRACE_S = 30.0
"""How long a stopping replica may finish its streams."""
_ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
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


def deploy(spec: ServeSpec, *, deadline_s: float = DEPLOY_S) -> Endpoint:
    """Start, or update, the endpoint on the connected Ray; returns when it answers.

    The same run deployed again is an update in place. Where this raises, what it started is ended again; an application
    that was there before stays as Ray Serve has it then.

    Args:
        spec: what to serve.
        deadline_s: seconds within which the replicas must run.

    Raises:
        ConfigError: the model folder cannot be served, the port is taken, the key's variable is not set, or the Ray
            Serve that runs already holds another application or is open to other machines without a key.
        ServeError: the replicas did not come up, or not in time.
    """
    read_model_folder(spec.model_uri)  # fails early, with the user's message
    key = read_key(spec.config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = _running_http()
    if running is None:
        host, port = spec.config.host, spec.config.port or free_port(spec.config.host)
        check_port(host, port)
        updates = False
    else:
        host, port = running
        _check_shared(spec, host, port)
        updates = spec.app_name in ray_serve.status().applications
    endpoint = Endpoint(url_of(host, port), spec.model_name, spec.fingerprint, spec.app_name, running is None)
    try:
        if running is None:
            ray_serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host=host, port=port),
                logging_config=_logging(),
            )
        target = ray_serve.RunTarget(_application(spec, key), name=spec.app_name, route_prefix=_ROUTE)
        ray_serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_running(spec, deadline_s)
        _wait_ready(endpoint.url)
    except BaseException as error:
        if not updates:
            _abandon(endpoint)
        if isinstance(error, RuntimeError | RayError | RayServeException | TimeoutError):
            raise ServeError(
                f"the replicas that serve {spec.model_uri} did not start: {error} "
                "See the replica's log in the Ray session's logs/serve folder."
            ) from error
        raise
    return endpoint


def application(spec: ServeSpec) -> Any:
    """The Serve application of a model, for whoever starts applications other than `deploy`; Ray need not run yet.

    Raises:
        ConfigError: the model folder cannot be served, or the key's variable is not set.
    """
    read_model_folder(spec.model_uri)
    return _application(spec, read_key(spec.config))


def undeploy(endpoint: Endpoint, *, keep_serve: bool = False) -> None:
    """Stop the endpoint, and no other. One that has ended already is fine.

    Args:
        endpoint: as `deploy` returned it.
        keep_serve: leave Ray Serve itself running, as where the whole cluster ends next; otherwise it is shut down
            where `deploy` started it, unless it runs other applications.
    """
    if _running_http() is None:
        return
    applications = set(ray_serve.status().applications)
    if endpoint.started_serve and not keep_serve and applications <= {endpoint.app_name}:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
    elif endpoint.app_name in applications:
        ray_serve.delete(endpoint.app_name)


def engine_stats(endpoint: Endpoint) -> EngineStats:
    """Load of one engine replica (with several: of one of them)."""
    handle = ray_serve.get_deployment_handle(_ENGINE, endpoint.app_name)
    stats: EngineStats = handle.stats.remote().result(timeout_s=_PROBE_S)
    return stats


def _application(spec: ServeSpec, key: bytes | None) -> Any:
    config = spec.config
    fixed = config.replicas.min == config.replicas.max
    runtime_env = {"env_vars": {**_ONE_LOOP, **s3_environment()}}
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
            "runtime_env": runtime_env,
        },
        logging_config=_logging(),
    )(Engine)
    ingress = ray_serve.deployment(
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=10_000,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=_GRACE_S,
        ray_actor_options={"num_cpus": 0, "runtime_env": runtime_env},
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


def _running_http() -> tuple[str, int] | None:
    """Where the HTTP proxy of a Ray Serve that runs already listens; None where none runs.

    Ray 2.60 tells this only through its private client.

    Raises:
        ConfigError: it runs without an HTTP proxy.
    """
    client = _running_client()
    if client is None:
        return None
    options = client.http_config
    if options.host is None:
        raise ConfigError("Ray Serve runs already, without an HTTP proxy. End it (serve shutdown), and try again.")
    return options.host, options.port


def _running_client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _check_shared(spec: ServeSpec, host: str, port: int) -> None:
    """Whether the endpoint may go into the Ray Serve that runs already, whose proxy it cannot choose."""
    where = f"Ray Serve runs already and listens on {host}:{port}"
    if not is_loopback(host) and spec.config.api_key_env is None:
        raise ConfigError(
            f"{where}, which other machines reach, and serve.api_key_env is not set. Name the environment variable "
            "that holds the key, or end that Ray Serve (serve shutdown)."
        )
    for name, details in _running_client().get_serve_details()["applications"].items():
        if name != spec.app_name and details["route_prefix"] == _ROUTE and details["status"] != "DELETING":
            raise ConfigError(
                f"{where}, and its application {name!r} holds the route {_ROUTE} that {spec.app_name!r} needs. End "
                f"the other one (ray.serve.delete({name!r}), or serve shutdown for all), or use another cluster."
            )
    if not is_loopback(host) or (spec.config.port and (host, port) != (spec.config.host, spec.config.port)):
        _LOG.warning("%s; serve.host and serve.port do not change that", where)


def _wait_running(spec: ServeSpec, deadline_s: float) -> None:
    """Poll the application until all its replicas run."""
    deadline = time.monotonic() + deadline_s
    while True:
        found = ray_serve.status().applications.get(spec.app_name)
        if found is None:
            raise ServeError(f"the application {spec.app_name} was deleted while it started. Deploy it again.")
        if found.status == ApplicationStatus.RUNNING:
            return
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise ServeError(f"the replicas that serve {spec.model_uri} did not start: {_state_of(found)}")
        if time.monotonic() >= deadline:
            raise ServeError(
                f"the replicas that serve {spec.model_uri} did not run within {deadline_s:g} s: {_state_of(found)} "
                f"Each needs serve.cpus_per_replica={spec.config.cpus_per_replica:g} and "
                f"serve.gpus_per_replica={spec.config.gpus_per_replica:g} free on one node. Lower them or "
                "serve.replicas.min, or add nodes."
            )
        time.sleep(_POLL_S)


def _state_of(found: ApplicationStatusOverview) -> str:
    """What Ray Serve says of an application and those of its deployments that are not well."""
    parts = [found.message.strip()] if found.message.strip() else []
    for name, deployment in found.deployments.items():
        if deployment.status != "HEALTHY":
            counts = ", ".join(f"{count} {state}" for state, count in deployment.replica_states.items() if count)
            parts.append(f"{name} is {deployment.status.value} ({counts or 'no replica'}) {deployment.message}".strip())
    return " ".join(part if part.endswith(".") else f"{part}." for part in parts) or "Ray Serve gives no reason."


def _delete_now(app_name: str) -> None:
    """Delete an application that never served: no stream has to be finished.

    Ray Serve (2.60) gives even a replica that waits for a node all of _GRACE_S, and replaces one that is killed before
    the deletion has reached it, so they are killed for as long as the application is there.
    """
    ray_serve.delete(app_name, _blocking=False)
    deadline = time.monotonic() + _GRACE_S
    while app_name in ray_serve.status().applications and time.monotonic() < deadline:
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if str(actor["name"]).startswith(f"SERVE_REPLICA::{app_name}#"):
                with contextlib.suppress(ValueError):  # it has ended by itself
                    ray.kill(ray.get_actor(actor["name"], actor["namespace"]))
        time.sleep(_POLL_S)


def _abandon(endpoint: Endpoint) -> None:
    """End what a deployment that failed has started; what goes wrong here must not hide why."""
    try:
        if _running_http() is not None and endpoint.app_name in ray_serve.status().applications:
            _delete_now(endpoint.app_name)
        undeploy(endpoint)
    except (RuntimeError, RayError, RayServeException, TimeoutError) as error:
        _LOG.warning("the application %s could not be ended: %s", endpoint.app_name, error)


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
