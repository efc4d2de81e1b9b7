"""A run's folder, `STORAGE/NAME/`: what lies where, who may write it, and what a later run must agree with.

Everything outside this process learns of a run from here. The controller opens the folder for writing and holds it
alone; readers (`stormjib status`, `logs`) need no lock.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import RunConfig, dump_yaml
from cluster.evaluations import scores_of
from cluster.events import Event, EventLog
from cluster.folder_lock import FolderLock
from cluster.journal import Journal, open_journal, read_journal
from data_service import storage
from data_service.errors import ConfigError

__all__ = ["RunFolder", "RunWriter", "StepHistory"]


@dataclass(frozen=True)
class StepHistory:
    """The optimizer steps that count, and the evaluations, as metrics.jsonl holds them."""

    steps: tuple[dict[str, Any], ...]
    evals: dict[int, dict[str, Any]]

    @property
    def scores(self) -> dict[int, float]:
        """How good each evaluation was by the task's own metric; lower is better."""
        return scores_of(self.evals)

    @property
    def last_step(self) -> int:
        """The newest optimizer step; 0 when there is none."""
        return int(self.steps[-1]["step"]) if self.steps else 0


class RunFolder:
    """Names and reads what lies in a run's folder."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.config_uri = f"{self.root}/config.yaml"
        self.events_uri = f"{self.root}/events.jsonl"
        self.metrics_uri = f"{self.root}/metrics.jsonl"
        self.discarded_uri = f"{self.root}/metrics.discarded.jsonl"
        self.checkpoints_uri = f"{self.root}/checkpoints"
        self.stop_uri = f"{self.root}/control/stop"
        self.profile_uri = f"{self.root}/control/profile"
        self.logs_uri = f"{self.root}/logs"

    def export_uri(self, step: int) -> str:
        """The Hugging Face folder of a step."""
        return f"{self.root}/export/step_{step:08d}"

    def exists(self) -> bool:
        """Whether a run was started here."""
        return storage.exists(self.config_uri)

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return read_journal(self.events_uri)

    def history(self) -> StepHistory:
        """The steps that count and the evaluations."""
        records = read_journal(self.metrics_uri)
        return StepHistory(
            steps=tuple(record for record in records if "loss" in record),
            evals={int(record["step"]): record["eval"] for record in records if "eval" in record},
        )

    def saved_config(self) -> dict[str, Any]:
        """The resolved configuration of the newest start.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            loaded = yaml.safe_load(storage.read_bytes(self.config_uri).decode())
        except (yaml.YAMLError, UnicodeDecodeError) as cause:
            raise ConfigError(f"{self.config_uri} is damaged: {cause}. Give this run another run.name.") from cause
        if not isinstance(loaded, dict):
            raise ConfigError(f"{self.config_uri} is damaged: it holds no keys. Give this run another run.name.")
        return loaded

    def request_stop(self) -> None:
        """Ask the controller to write a checkpoint and to end."""
        storage.write_bytes(self.stop_uri, json.dumps({"time": time.time()}).encode())

    def request_profile(self, steps: int) -> str:
        """Ask the ranks for a trace of their next steps; returns the folder that the traces will be in."""
        number = (self.profile_request() or (0, 0))[0] + 1
        storage.write_bytes(self.profile_uri, json.dumps({"number": number, "steps": steps}).encode())
        return self.traces_uri(number)

    def profile_request(self) -> tuple[int, int] | None:
        """(number, steps) of the newest request for a trace; None without any, or where it is damaged."""
        try:
            found = json.loads(storage.read_bytes(self.profile_uri))
            return int(found["number"]), int(found["steps"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def traces_uri(self, number: int) -> str:
        """Folder of the traces of one request."""
        return f"{self.root}/profiles/{number:04d}"

    def check_identity(self, config: RunConfig) -> None:
        """Compare with the run that was started here.

        Raises:
            ConfigError: seed, data, model, global batch or optimizer differ; the message lists the differences. Or the
                folder's configuration has other keys than this version's.
        """
        if not self.exists():
            return
        try:
            saved = RunConfig.model_validate(self.saved_config()).identity()
        except ValidationError as cause:
            findings = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in cause.errors()[:3])
            raise ConfigError(
                f"{self.config_uri} was written by another version of stormjib ({findings}). Go on with that version, "
                "or give this run another run.name. Nothing was changed."
            ) from cause
        wanted = config.identity()
        changed = [key for key in wanted if wanted[key] != saved.get(key)]
        if changed:
            lines = [f"  {key}: started with {saved.get(key)!r}, now {wanted[key]!r}" for key in changed]
            raise ConfigError(
                f"{self.root} holds a run that cannot go on with this configuration:\n" + "\n".join(lines) + "\n"
                "Set the values back, or give this run another run.name. Nothing was changed."
            )


class RunWriter:
    """The folder opened by the one controller that writes it."""

    def __init__(self, folder: RunFolder, lock: FolderLock, events: Journal, metrics: Journal) -> None:
        self.folder = folder
        self._lock = lock
        self._events_journal = events
        self._metrics = metrics
        self._discarded: Journal | None = None
        self.events = EventLog(events)

    @classmethod
    def open(cls, config: RunConfig) -> "RunWriter":
        """Take the folder, check that the configuration may go on in it, and record the start.

        Raises:
            ConfigError: another controller holds the folder, or the configuration is another run's.
        """
        folder = RunFolder(config.root)
        lock = FolderLock.acquire(folder.root)
        try:
            folder.check_identity(config)
            resumed = folder.exists()
            storage.write_bytes(folder.config_uri, dump_yaml(config).encode())
            storage.remove_file(folder.stop_uri)
            writer = cls(folder, lock, open_journal(folder.events_uri), open_journal(folder.metrics_uri))
        except BaseException:
            lock.release()
            raise
        writer.events.attempt = max((int(event.get("attempt", 0)) for event in folder.events()), default=0)
        writer.events.write(
            Event.RUN_STARTED, fields={"config_digest": config.digest(), "pid": lock.pid, "resumed": resumed}
        )
        return writer

    def next_attempt(self) -> int:
        """A new attempt number, claimed against every other controller of this run: the fencing token of commits."""
        attempt = self.events.attempt
        while True:
            attempt += 1
            claim = json.dumps({"pid": self._lock.pid, "host": self._lock.host, "time": time.time()})
            if storage.put_if_absent(f"{self.folder.root}/control/attempt_{attempt:06d}.json", claim.encode()):
                self.events.attempt = attempt
                return attempt

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        self._metrics.append(record)

    def discard_after(self, step: int) -> int:
        """Move the lines of steps after `step` to metrics.discarded.jsonl; returns how many steps moved."""
        dropped = self._metrics.rewrite(lambda record: int(record["step"]) <= step)
        if dropped:
            if self._discarded is None:
                self._discarded = open_journal(self.folder.discarded_uri)
            for record in dropped:
                self._discarded.append(record)
            self._discarded.flush()
        return sum("loss" in record for record in dropped)

    def stop_requested(self) -> bool:
        """Whether somebody called `RunFolder.request_stop` since the start."""
        return storage.exists(self.folder.stop_uri)

    def flush(self) -> None:
        """Make journals durable on an object store too."""
        self._events_journal.flush()
        self._metrics.flush()

    def close(self) -> None:
        """Flush, and let another controller have the folder."""
        for journal in (self._events_journal, self._metrics, self._discarded):
            if journal is not None:
                journal.close()
        self._lock.release()
