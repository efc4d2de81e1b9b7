"""Errors of the trainer.

StormjibError (data_service.errors)
├── TrainError
│   ├── WorkerLostError             a rank ended before its run did: retryable
│   ├── CollectiveTimeoutError      a collective did not end within its deadline: retryable
│   ├── NonFiniteLossError          the loss or the gradient is not a number; never retried blindly
│   └── LossSpikeError              the loss leapt; never retried blindly
└── CheckpointError
├── CheckpointIncompleteError   parts do not cover every parameter once, or no manifest was committed
├── CheckpointCorruptError      bytes of a part do not match the manifest
├── ManifestInvalidError        a manifest cannot be read as one
├── CommitLostError             another attempt committed this step first, or has taken over
└── SaveFailedError             a part was not taken by the store, or not in time: retryable
"""

from data_service.errors import StormjibError

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointIncompleteError",
    "CollectiveTimeoutError",
    "CommitLostError",
    "LossSpikeError",
    "ManifestInvalidError",
    "NonFiniteLossError",
    "SaveFailedError",
    "TrainError",
    "WorkerLostError",
]


class TrainError(StormjibError):
    """Training failed."""


class WorkerLostError(TrainError):
    """A rank ended before its run did."""

    retryable = True


class CollectiveTimeoutError(TrainError):
    """A collective did not end within its deadline."""

    retryable = True


class NonFiniteLossError(TrainError):
    """The loss or the gradient norm is not a number."""


class LossSpikeError(TrainError):
    """The loss leapt beyond what `train.guard` allows."""


class CheckpointError(StormjibError):
    """A checkpoint cannot be written or read."""


class CheckpointIncompleteError(CheckpointError):
    """The parts do not cover every parameter exactly once, or the step has no manifest."""


class CheckpointCorruptError(CheckpointError):
    """The bytes of a part do not match its manifest."""


class ManifestInvalidError(CheckpointError):
    """A manifest cannot be read as one."""


class CommitLostError(CheckpointError):
    """Another attempt has committed this step; what it wrote stands."""


class SaveFailedError(CheckpointError):
    """A part of a checkpoint was not taken by the store, or not within its deadline."""

    retryable = True
