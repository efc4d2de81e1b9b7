"""Errors of the cluster runtime.

StormjibError (data_service.errors)
└── ClusterError
    ├── RunFailedError              the run cannot go on: exit 1
    ├── LocalNodeError              a node on this machine did not start, or ended early
    ├── StaleAttemptError           an agent was asked to start an attempt that is over
    └── AgentLostError              a node's agent is gone or does not answer: retryable
"""

from data_service.errors import StormjibError

__all__ = ["AgentLostError", "ClusterError", "LocalNodeError", "RunFailedError", "StaleAttemptError"]


class ClusterError(StormjibError):
    """The cluster runtime failed."""


class RunFailedError(ClusterError):
    """The run cannot go on; the message names the cause."""


class LocalNodeError(ClusterError):
    """A Ray node on this machine did not start, or ended early."""


class StaleAttemptError(ClusterError):
    """An agent was asked to start an attempt that is over, or older than the one it runs."""


class AgentLostError(ClusterError):
    """A node's agent is gone, or did not answer in time."""

    retryable = True
