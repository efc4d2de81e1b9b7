"""Which committed steps stay: the rule, and the deletion of the rest. Only the controller prunes."""

import logging
from collections.abc import Iterable, Mapping

from data_service import storage
from trainer.errors import CheckpointError
from trainer.manifest import list_complete, list_steps, manifest_uri, read_manifest
from trainer.parts import step_folder

__all__ = ["kept_steps", "prune"]

_LOG = logging.getLogger(__name__)


def kept_steps(complete: Iterable[int], scores: Mapping[int, float], keep_last: int, keep_best: int) -> set[int]:
    """Which steps the retention rule keeps: the newest `keep_last`, and beside them the `keep_best` with lowest score.

    Args:
        complete: committed steps.
        scores: of those that were evaluated; lower is better.
        keep_last: at least 1.
        keep_best: how many more to keep; among equal scores the newer.
    """
    newest_first = sorted(set(complete), reverse=True)
    last = newest_first[:keep_last]
    best = sorted((step for step in newest_first[keep_last:] if step in scores), key=lambda step: (scores[step], -step))
    return {*last, *best[:keep_best]}


def prune(checkpoints_uri: str, keep: set[int], *, newest: int) -> list[int]:
    """Delete steps that are not kept, half-written ones among them.

    A manifest goes first, so that a prune cut short leaves no checkpoint that only looks whole. In committed steps that
    stay, parts of attempts that were not committed are deleted too.

    Args:
        checkpoints_uri: the run's checkpoints.
        keep: steps to keep, chosen among those up to `newest`.
        newest: the step that was just committed. It is never deleted. What lies above it is left alone: a save under
            way, or a damaged step that the run passed over and will write again.

    Returns:
        The deleted steps.
    """
    complete = [step for step in list_complete(checkpoints_uri) if step <= newest]
    doomed = [step for step in list_steps(checkpoints_uri) if step not in keep and step < newest]
    for step in doomed:
        storage.remove_file(manifest_uri(checkpoints_uri, step))
        storage.remove_tree(storage.join(checkpoints_uri, step_folder(step)))
    for step in complete:
        if step not in doomed:
            _remove_other_attempts(checkpoints_uri, step)
    return doomed


def _remove_other_attempts(checkpoints_uri: str, step: int) -> None:
    step_uri = storage.join(checkpoints_uri, step_folder(step))
    leftovers = [name for name in storage.list_names(step_uri) if name.startswith("attempt_")]
    if len(leftovers) < 2:
        return
    try:
        committed = read_manifest(checkpoints_uri, step).attempt
    except CheckpointError as error:
        _LOG.warning("Step %d keeps all its attempts: %s", step, error)
        return
    for name in leftovers:
        if name != f"attempt_{committed}":
            storage.remove_tree(storage.join(step_uri, name))
