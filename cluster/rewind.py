"""Takes a run back to an older checkpoint: what was saved and recorded behind it is set aside, and nothing is deleted.

The way to leave out batches that were consumed already, or to train on from an older step with other settings.
"""

from cluster.config import RunConfig
from cluster.events import Event
from cluster.folder_lock import FolderLock
from cluster.journal import open_journal
from cluster.run_store import RunFolder, RunWriter
from cluster.states import RunState
from data_service import storage
from data_service.errors import ConfigError
from trainer import manifest as checkpoints
from trainer.errors import CheckpointError
from trainer.superseded import set_aside

__all__ = ["rewind"]


def rewind(config: RunConfig, after: int) -> tuple[int, list[int]]:
    """Set the checkpoints of steps above `after` aside, and the recorded steps behind the newest that is left.

    On an object store nothing tells whether the run goes on somewhere: end it first.

    Returns:
        The step that the run goes on from, and the steps that were set aside.

    Raises:
        ConfigError: there is no checkpoint to go on from at or below `after`, or somebody holds the run's folder.
    """
    folder = RunFolder(config.root)
    if not folder.exists():
        raise ConfigError(f"{folder.root}: no run was started here. Check run.name and run.storage.")
    lock = FolderLock.acquire(folder.root)
    try:
        committed = checkpoints.list_complete(folder.checkpoints_uri)
        left = max((step for step in committed if step <= after and _is_usable(folder, step)), default=None)
        if left is None:
            raise ConfigError(
                f"--after {after}: no checkpoint that can be loaded is at or below this step in "
                f"{folder.checkpoints_uri}, there are {', '.join(map(str, committed)) or 'none'}. Name a later step, "
                "or begin again with another run.name. Nothing was changed."
            )
        events = folder.events()
        writer = RunWriter(folder, lock, open_journal(folder.events_uri), open_journal(folder.metrics_uri))
    except BaseException:
        lock.release()
        raise
    try:
        writer.events.state = RunState(events[-1]["state"]) if events else RunState.PENDING
        writer.events.attempt = max((int(event.get("attempt", 0)) for event in events), default=0)
        moved = set_aside(folder.checkpoints_uri, left)
        writer.discard_after(left)
        writer.events.write(Event.CHECKPOINTS_SET_ASIDE, fields={"step": left, "set_aside": list(moved)})
        storage.remove_file(folder.stop_uri)
    finally:
        writer.close()
    return left, moved


def _is_usable(folder: RunFolder, step: int) -> bool:
    try:
        checkpoints.verify(folder.checkpoints_uri, step)
    except CheckpointError:
        return False
    return True
