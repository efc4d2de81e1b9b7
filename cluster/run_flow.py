"""A run from its file to its endpoint: prepare, train, promote, serve; and how each end is recorded."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

from cluster.chaining import check_base, with_base
from cluster.config import LaidOutConfig, RunConfig
from cluster.console import RunConsole
from cluster.controller import Controller
from cluster.events import Event
from cluster.node_pool import NodePool
from cluster.planning import laid_out
from cluster.promotion import Export, newest_export, promote
from cluster.ray_map import ray_mapper
from cluster.ray_session import Session, open_session
from cluster.run_data import check_resume, dataset_of_run, service_token, task_facts
from cluster.run_store import RunFolder, RunWriter
from cluster.states import RunState
from cluster.stop_signal import StopSignal
from data_service import storage
from data_service.errors import ConfigError, StormjibError
from data_service.manifest import DatasetManifest
from data_service.prepare import prepare
from data_service.readers import find_files
from serve.deployment import deploy, undeploy
from serve.preflight import check_deployable
from serve.spec import Endpoint, ServeSpec
from trainer.observe.services import check_services
from trainer.tasks.paths import check_task_module

__all__ = ["run_all", "serve_export", "train_and_export"]


def train_and_export(config: RunConfig, console: RunConsole) -> int:
    """Prepare, train and export, on a session of its own; returns the exit code."""
    _check_early(config)
    with (
        _opened(config) as writer,
        StopSignal(writer.stop_requested, console.say) as stop,
        open_session(config.cluster, config.serve) as session,
    ):
        export = _train(config, session, writer, console, stop)
        return 130 if export is None and stop.interrupted else 0


def run_all(config: RunConfig, console: RunConsole) -> int:
    """Prepare, train, export and serve until Ctrl-C; inside a Ray job the application stays up and this returns."""
    _check_early(config)
    _check_servable(config)
    with ExitStack() as outlives_training:
        with _opened(config) as writer, StopSignal(writer.stop_requested, console.say) as stop:
            session = outlives_training.enter_context(open_session(config.cluster, config.serve))
            check_deployable(config.serve, local=session.is_local)
            export = _train(config, session, writer, console, stop, to_serve=True)
            if export is None:
                return 130 if stop.interrupted else 0
            endpoint = _deploy(config, session, export, console)
            writer.events.write(Event.SERVING, fields={"url": endpoint.url, "step": export.step})
        _serve_until_interrupted(session, endpoint, console)
    return 0


def serve_export(config: RunConfig, console: RunConsole) -> int:
    """Serve the newest export until Ctrl-C; inside a Ray job the application stays up and this returns."""
    export = newest_export(config)
    with open_session(config.cluster, config.serve, with_nodes=False) as session:
        endpoint = _deploy(config, session, export, console)
        _serve_until_interrupted(session, endpoint, console)
    return 0


def _check_early(config: RunConfig) -> None:
    """What can be known before a node is started: an unfit or foreign folder, sources or a token that are not there.

    Raises:
        ConfigError: the folder holds a run that cannot go on with this configuration, or is no place for checkpoints;
            a running data service is named, and no token for it; the run that it starts from is not there, or the
            module of its task.
        SourceError: a source matches no file.
    """
    storage.check_commits(config.root)
    RunFolder(config.root).check_identity(config)
    if config.data.service.address:
        service_token()
    check_services(config.observe.wandb, config.observe.mlflow)
    check_base(config)
    check_task_module(config.train)
    find_files(config.data.sources)
    check_resume(config)


def _check_servable(config: RunConfig) -> None:
    """Refuse what an endpoint cannot answer with, as far as the file tells.

    Raises:
        ConfigError: the run trains a classifier.
    """
    if config.train.task == "text_classification":
        _refuse_classifier(config.train.task)


def _check_task_servable(config: LaidOutConfig, manifest: DatasetManifest) -> None:
    """Refuse a user's own task whose model an endpoint cannot answer with; only the task knows, with its dataset.

    Raises:
        ConfigError: the task trains a classifier, or cannot be made.
    """
    if ":" not in config.train.task:
        return
    from trainer.tasks.make import make_task

    if make_task(config.train, task_facts(config, manifest)).num_labels:
        _refuse_classifier(config.train.task)


def _refuse_classifier(task: str) -> NoReturn:
    raise ConfigError(
        f"train.task={task}: the endpoint generates text, and a classifier has none. Use `stormjib train`, whose "
        "export `transformers` loads as AutoModelForSequenceClassification."
    )


@contextmanager
def _opened(config: RunConfig) -> Iterator[RunWriter]:
    """The run's folder; whatever goes wrong inside is recorded as the run's end."""
    writer = RunWriter.open(config)
    try:
        yield writer
    except BaseException as error:
        if not writer.events.state.is_terminal:
            writer.events.enter(RunState.CANCELLED if isinstance(error, KeyboardInterrupt) else RunState.FAILED)
        text = str(error) if isinstance(error, StormjibError) else f"{type(error).__name__}: {error}"
        writer.events.write(Event.RUN_ENDED, fields={"step": _last_step(writer), "error": text[:4000]})
        raise
    finally:
        writer.close()


def _train(
    config: RunConfig,
    session: Session,
    writer: RunWriter,
    console: RunConsole,
    stop: StopSignal,
    *,
    to_serve: bool = False,
) -> Export | None:
    """Prepare, train, export; None when the run was stopped on request."""
    with NodePool(config, session, writer, console) as pool:
        pool.start()
        config = with_base(config, console.say)
        began = time.monotonic()
        prepared = prepare(config.data, config.dataset_uri, mapper=ray_mapper(), progress=console.prepare)
        manifest = dataset_of_run(config, prepared)
        if manifest.digest != prepared.digest:
            console.say(
                f"the run goes on with generation {manifest.generation} of its dataset, which its checkpoints name; "
                f"generation {prepared.generation} is for new runs"
            )
        seconds = time.monotonic() - began
        _tell_dataset(config, manifest, seconds, writer, console)
        decided = laid_out(config, manifest, console.say)
        if to_serve:
            _check_task_servable(decided, manifest)
        outcome = Controller(decided, pool, writer, console, manifest, stop).train()
        if outcome.reason == "stopped":
            writer.events.enter(RunState.CANCELLED)
            writer.events.write(Event.RUN_ENDED, fields={"step": outcome.step, "error": None})
            console.say(f"stopped after step {outcome.step}; the same command goes on from its checkpoint")
            return None
        export = promote(config, writer)
        writer.events.enter(RunState.FINISHED)
        writer.events.write(Event.RUN_ENDED, fields={"step": outcome.step, "error": None})
        console.say(f"exported step {export.step} to {export.uri}")
        return export


def _tell_dataset(
    config: RunConfig, manifest: DatasetManifest, seconds: float, writer: RunWriter, console: RunConsole
) -> None:
    documents, tokens = manifest.num_documents(), manifest.num_tokens()
    fields = {
        "digest": manifest.digest,
        "generation": manifest.generation,
        "documents": documents,
        "tokens": tokens,
        "rejects": manifest.num_rejects,
        "seconds": round(seconds, 3),
    }
    writer.events.write(Event.DATASET_READY, fields=fields)
    rejects = f"; {manifest.num_rejects:,} records rejected, see rejects*.jsonl in {config.dataset_uri}"
    console.say(
        f"dataset: {documents:,} documents, {tokens:,} tokens, vocabulary {manifest.vocab_size:,}"
        + (rejects if manifest.num_rejects else "")
    )


def _deploy(config: RunConfig, session: Session, export: Export, console: RunConsole) -> Endpoint:
    spec = ServeSpec(
        model_uri=export.uri,
        model_name=config.serve.model_name or config.run.name,
        step=export.step,
        digest=export.digest,
        config=config.serve,
        device="cuda" if config.serve.gpus_per_replica else "cpu",
    )
    endpoint = deploy(spec)
    console.say(f"serving step {export.step} as {spec.model_name!r} at {endpoint.url}")
    console.say(
        f"""try: curl {endpoint.url}/v1/completions -H 'Content-Type: application/json' """
        f"""-d '{{"model": "{spec.model_name}", "prompt": "...", "max_tokens": 32, "stream": true}}'"""
    )
    return endpoint


def _serve_until_interrupted(session: Session, endpoint: Endpoint, console: RunConsole) -> None:
    if session.in_job:
        console.say("the application stays up after this job; `serve shutdown` on the cluster ends it")
        return
    console.say("Ctrl-C ends the endpoint")
    ended = threading.Event()
    previous = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ended.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    undeploy(endpoint, keep_serve=session.is_local)


def _last_step(writer: RunWriter) -> int:
    return writer.folder.history().last_step
