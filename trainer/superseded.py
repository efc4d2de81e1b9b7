"""Moves committed checkpoints out of a run's way, so that it goes on from an older one. Nothing saved is deleted.

What is set aside lies in `superseded/` beside the steps, one folder for each step and attempt. It is a whole checkpoint
still: moved back under its step's name, with `fences/` deleted, it can be loaded again.
"""

from data_service import storage
from trainer.errors import CheckpointError
from trainer.manifest import MANIFEST_NAME, list_complete, read_manifest
from trainer.parts import step_folder

__all__ = ["SUPERSEDED", "set_aside"]

SUPERSEDED = "superseded"


def set_aside(checkpoints_uri: str, after: int) -> list[int]:
    """Move the committed steps above `after` to `superseded/step_NNNNNNNN.attempt_K/`; returns them, ascending.

    The newest goes first, and of each step its manifest goes last: cut short and asked again, it moves the rest. Only
    who holds the run's folder may call this.
    """
    moved = [step for step in list_complete(checkpoints_uri) if step > after]
    for step in reversed(moved):
        source = storage.join(checkpoints_uri, step_folder(step))
        target = storage.join(checkpoints_uri, SUPERSEDED, _name_of(checkpoints_uri, step))
        names = [name for name in storage.list_tree(source) if name != MANIFEST_NAME]
        for name in [*names, MANIFEST_NAME]:
            storage.move_file(storage.join(source, name), storage.join(target, name))
        storage.remove_tree(source)
    return moved


def _name_of(checkpoints_uri: str, step: int) -> str:
    try:
        return f"{step_folder(step)}.attempt_{read_manifest(checkpoints_uri, step).attempt}"
    except CheckpointError:  # what cannot be read is kept too
        return f"{step_folder(step)}.damaged"
