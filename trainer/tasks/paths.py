"""Where a user's own task lies. No torch: the controller looks before a node is started."""

import importlib.util

from data_service.errors import ConfigError
from trainer.config import TrainConfig

__all__ = ["check_task_module"]


def check_task_module(train: TrainConfig) -> None:
    """See that the module of `train.task` can be found here; our own tasks have none.

    Raises:
        ConfigError: it cannot.
    """
    module, _, name = train.task.partition(":")
    if not name:
        return
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        found = None
    if found is None:
        raise ConfigError(
            f"train.task={train.task}: there is no module {module}. Install it on every node, or name its folder in "
            "PYTHONPATH."
        )
