"""Where a user's own task lies. No torch: the controller looks before a node is started."""

import importlib.util

from data_service.errors import ConfigError
from trainer.config import AutoTrainConfig

__all__ = ["check_task_module"]


def check_task_module(train: AutoTrainConfig) -> None:
    """See that the module of `train.task` can be found here; our own tasks have none.

    Raises:
        ConfigError: it cannot, or a package above it raises when it is imported.
    """
    module, _, name = train.task.partition(":")
    if not name:
        return
    if module == "__main__":
        raise ConfigError(
            f"train.task={train.task}: in a rank __main__ is another module. Put the class into a module that can be "
            "imported."
        )
    try:
        found = importlib.util.find_spec(module)
    except Exception as error:  # it imports the packages above the module, which are the user's
        if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"train.task={train.task}: looking for its module raised {type(error).__name__}: {error}. Mend the "
                "path, or the package that holds the module."
            ) from error
        found = None
    if found is None:
        raise ConfigError(
            f"train.task={train.task}: there is no module {module}. Install it on every node, or name its folder in "
            "PYTHONPATH."
        )
