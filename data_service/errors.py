"""Errors of the data service, and the roots every folder's errors derive from.

StormjibError
├── ConfigError                 the user's mistake: exit 2
│   └── EmptySplitError         the dataset holds no row of a split
└── DataError
    ├── SourceError             a source cannot be read, or too many records are bad: exit 2
    ├── ShardCorruptError       a shard's bytes do not match its checksum
    ├── CursorMismatchError     a cursor or ticket belongs to another plan
    ├── DeliveryError           a worker delivered other rows than the plan's
    ├── DataUnavailableError    a worker or the control plane could not be reached: retryable
    └── DataStalledError        no worker delivered a batch within the deadline
"""

__all__ = [
    "ConfigError",
    "CursorMismatchError",
    "DataError",
    "DataStalledError",
    "DataUnavailableError",
    "DeliveryError",
    "EmptySplitError",
    "ShardCorruptError",
    "SourceError",
    "StormjibError",
]


class StormjibError(Exception):
    """Root of all errors with a message meant for people."""

    retryable = False
    exit_code = 1


class ConfigError(StormjibError):
    """What the user asked for cannot be done; the message says what to change."""

    exit_code = 2


class EmptySplitError(ConfigError):
    """The dataset holds no row of a split."""


class DataError(StormjibError):
    """The data service failed."""


class SourceError(DataError):
    """A source cannot be read, or too many of its records are bad."""

    exit_code = 2


class ShardCorruptError(DataError):
    """A shard's bytes do not match its checksum."""


class CursorMismatchError(DataError):
    """A cursor or a ticket belongs to another plan."""


class DeliveryError(DataError):
    """A worker delivered rows that are not the plan's."""


class DataUnavailableError(DataError):
    """A data worker or the control plane could not be reached."""

    retryable = True


class DataStalledError(DataError):
    """No data worker delivered a batch within the deadline."""
