"""Which data a run reads: the order of its rows, the generation of its dataset, and whether its checkpoints fit them.

All of it follows from the configuration, the dataset's manifests and the newest checkpoint, and is known before a rank
starts. A run stays with the generation that its checkpoints name, whatever files were added to the sources since.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

from pydantic import ValidationError

from cluster.config import RunConfig
from cluster.run_store import RunFolder
from data_service.access import DataAccess
from data_service.bearer import TOKEN_VARIABLE, read_token
from data_service.config import DataConfig
from data_service.counts import read_counts
from data_service.cursor import Cursor
from data_service.errors import ConfigError, CursorMismatchError, DataError
from data_service.manifest import DatasetManifest, read_manifest, read_manifests
from data_service.plan import PLAN_VERSION, OrderSpec, Plan
from data_service.planning import make_plan
from trainer import manifest as checkpoints
from trainer.errors import CheckpointError
from trainer.manifest import TrainState
from trainer.tasks.facts import TaskFacts

__all__ = [
    "check_cursor",
    "check_resume",
    "dataset_of_run",
    "newest_state",
    "order_of",
    "running_service",
    "service_token",
    "task_facts",
    "train_plan",
]

_KEYS = {
    "seed": "run.seed",
    "seq_len": "data.seq_len",
    "global_batch": "train.global_batch",
    "window_shards": "data.shuffle_window_shards",
    "isolate_documents": "data.isolate_documents",
    "temperature": "data.mixture.temperature",
}


def order_of(config: RunConfig) -> OrderSpec:
    """What the run asks of the order of its rows."""
    return OrderSpec.from_config(config.data, seed=config.run.seed, global_batch=config.train.global_batch)


def train_plan(config: RunConfig, dataset: DatasetManifest) -> Plan:
    """The order of the run's training rows.

    Raises:
        ConfigError: the dataset cannot give these rows.
    """
    return make_plan(dataset, "train", order_of(config))


def task_facts(config: RunConfig, dataset: DatasetManifest) -> TaskFacts:
    """What ranks are told of the dataset beside its rows.

    Raises:
        ConfigError: classes are to be balanced, and the counts of the dataset are gone.
    """
    rows: tuple[int, ...] = ()
    if dataset.labels:
        counted = Counter[str]()
        for source in read_counts(config.dataset_uri, dataset.generation):
            counted.update(source.labels.get("train", {}))
        rows = tuple(counted[label] for label in dataset.labels)
    return TaskFacts(dataset.labels, rows, dataset.loss_masks)


def service_token() -> str:
    """The token of a data service that runs already.

    Raises:
        ConfigError: the environment holds none.
    """
    try:
        return read_token(None)
    except ConfigError as error:
        raise ConfigError(f"data.service.address names a data service that runs already: {error}") from error


def running_service(config: RunConfig, dataset: DatasetManifest) -> DataAccess:
    """What ranks need to read from a data service that runs already; asks it for the run's plan first.

    Raises:
        ConfigError: there is no token for it, it refuses the token, or it serves another dataset.
        DataError: it does not answer, or makes other plans.
    """
    from data_service.client import DataClient  # not needed where the run starts its own service

    service = config.data.service
    access = DataAccess(
        control=service.address,
        token=service_token(),
        order=order_of(config),
        dataset_digest=dataset.digest,
        run_ahead=service.run_ahead,
        hedge_s=service.hedge_s,
        read_stall_s=service.read_stall_s,
        stalled_s=service.stalled_s,
    )
    named = f"data.service.address={', '.join(service.address)}"
    with contextlib.closing(DataClient(access)) as client:
        try:
            plan = client.plan("train")
        except ConfigError as error:
            raise ConfigError(f"{named}: {error}") from error
        except DataError as error:
            if "UNAUTHENTICATED" not in str(error):
                raise
            raise ConfigError(
                f"{named}: the service refuses the token in {TOKEN_VARIABLE}. Set the service's."
            ) from error
    if plan != train_plan(config, dataset):
        raise CursorMismatchError(
            f"{named}: the service makes another plan for this run than this release. Use one release for both."
        )
    return access


def newest_state(config: RunConfig) -> TrainState | None:
    """The state of the newest committed checkpoint whose manifest can be read, whether its parts are whole or not."""
    uri = RunFolder(config.root).checkpoints_uri
    for step in reversed(checkpoints.list_complete(uri)):
        try:
            return checkpoints.read_manifest(uri, step).state
        except CheckpointError:
            continue  # the controller names it when it chooses the checkpoint to go on from
    return None


def check_resume(config: RunConfig) -> None:
    """Check the newest checkpoint against the configuration, before anything is prepared or started.

    Raises:
        ConfigError: the run cannot go on with these data.
    """
    state = newest_state(config)
    if state is None or not read_manifests(config.dataset_uri):
        return  # what is prepared is compared then
    check_cursor(config, _named_generation(config, state), state)


def dataset_of_run(config: RunConfig, prepared: DatasetManifest) -> DatasetManifest:
    """The generation that the run reads: the one its checkpoints name, else the newest.

    Args:
        config: of the run.
        prepared: the newest generation of its dataset.

    Raises:
        ConfigError: the checkpoints name a generation that is not there.
    """
    state = newest_state(config)
    if state is None or state.dataset_digest == prepared.digest:
        return prepared
    return _named_generation(config, state)


def check_cursor(config: RunConfig, dataset: DatasetManifest, state: TrainState) -> None:
    """See that the batches a checkpoint has consumed are those of this configuration.

    Raises:
        ConfigError: they are not; the message names the keys that differ.
    """
    plan = train_plan(config, dataset)
    try:
        Cursor(state.plan_digest, state.consumed_batches).check(plan)
    except CursorMismatchError as error:
        raise ConfigError(
            f"the checkpoint of step {state.step} in {config.root} has consumed its {state.consumed_batches} global "
            "batches in another order than this configuration's:\n"
            + "\n".join(f"  {line}" for line in _told_differences(config, dataset, state))
            + f"\nSet the values back, {_way_back(config, plan, state)}or give this run another run.name. Nothing was "
            "changed."
        ) from error


def _told_differences(config: RunConfig, dataset: DatasetManifest, state: TrainState) -> list[str]:
    """What differs by key; where nothing does, the release must."""
    then = ", ".join(f"{name} {version}" for name, version in sorted(state.versions.items()))
    return list(_differences(config, dataset, state)) or [
        f"the order itself: no key differs, and this release makes plans of version {PLAN_VERSION}. Another release "
        f"wrote the checkpoint (with {then or 'packages that it does not name'}); go on with that one"
    ]


def _way_back(config: RunConfig, plan: Plan, newest: TrainState) -> str:
    """How to go back to the newest checkpoint that this configuration's plan fits; empty where none does."""
    uri = RunFolder(config.root).checkpoints_uri
    for step in reversed(checkpoints.list_complete(uri)):
        if step >= newest.step:
            continue
        try:
            state = checkpoints.read_manifest(uri, step).state
            Cursor(state.plan_digest, state.consumed_batches).check(plan)
        except (CheckpointError, CursorMismatchError):
            continue
        return f"or go back to step {step} with `stormjib checkpoint drop FILE --after {step}`, "
    return ""


def _named_generation(config: RunConfig, state: TrainState) -> DatasetManifest:
    try:
        return read_manifest(config.dataset_uri, state.dataset_digest)
    except ConfigError as error:
        then, now = _data_of(state), config.data
        told = ""
        if then is not None and then.dataset != now.dataset:
            told = f"  data.dataset: trained on {then.dataset!r}, now {now.dataset!r}\n"
        raise ConfigError(
            f"{config.root} was trained to step {state.step} on the dataset {state.dataset_digest}, which is not in "
            f"{config.dataset_uri}:\n{told}  there are {_digests(config)}\nSet data.dataset back, or restore the "
            "dataset; or give this run another run.name. Nothing was changed."
        ) from error


def _digests(config: RunConfig) -> str:
    return ", ".join(found.digest for found in read_manifests(config.dataset_uri)) or "none"


def _data_of(state: TrainState) -> DataConfig | None:
    """The `data` section that a checkpoint was trained with; None where this release does not read it."""
    try:
        return DataConfig.model_validate(state.config.get("data"))
    except ValidationError:
        return None


def _differences(config: RunConfig, dataset: DatasetManifest, state: TrainState) -> Iterator[str]:
    """What decides the consumed batches, then and now, by key."""
    if dataset.digest != state.dataset_digest:
        yield f"dataset: trained on {state.dataset_digest}, now {dataset.digest}"
    data = _data_of(state)
    if data is None:
        yield "the checkpoint's own configuration cannot be read by this release"
        return
    now, then = order_of(config), OrderSpec.from_config(data, seed=state.seed, global_batch=state.global_batch)
    for name, key in _KEYS.items():
        if getattr(then, name) != getattr(now, name):
            yield f"{key}: trained with {getattr(then, name)!r}, now {getattr(now, name)!r}"
    free = make_plan(dataset, "train", then).batch_at(state.consumed_batches)
    rest = f"new ones may begin at global batch {free} or later"
    if _weights(then, free) != _weights(now, free):
        yield (
            "data.sources weights and data.mixture.changes: trained with "
            f"{_weights(then, free)}, now {_weights(now, free)}; {rest}"
        )
    if _skips(then, free) != _skips(now, free):
        yield f"data.skip: trained with {_skips(then, free)}, now {_skips(now, free)}; {rest}"


def _weights(order: OrderSpec, end: int) -> str:
    """Weights of the batches before `end`, as text."""
    told = [
        f"from batch {first} {', '.join(f'{name} {weight:g}' for name, weight in weights)}"
        for first, weights in order.weights
        if first < end
    ]
    return "; ".join(told) or "the sources' rows"


def _skips(order: OrderSpec, end: int) -> str:
    """Skipped ranges that begin before `end`, as text."""
    return ", ".join(f"{first} to {last - 1}" for first, last in order.skip if first < end) or "none"
