"""The task that a configuration names: one of ours, or a user's own by module path."""

import importlib
from collections.abc import Callable

from data_service.errors import ConfigError, StormjibError
from trainer.config import TrainConfig
from trainer.tasks.base import Task
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.facts import TaskFacts
from trainer.tasks.sft import SupervisedFineTuning
from trainer.tasks.text_classification import TextClassification

__all__ = ["make_task"]

_PARTS = ("metric", "better", "num_labels", "count", "targets", "loss", "zeros", "observe", "metrics")


def make_task(train: TrainConfig, facts: TaskFacts) -> Task:
    """The task of `train.task`.

    Args:
        train: the `train` section.
        facts: of the dataset.

    Raises:
        ConfigError: the dataset does not fit the task, there is no such task, or a user's own one raises.
    """
    if train.task == "causal_lm":
        return CausalLM()
    if train.task == "sft":
        return SupervisedFineTuning.of(facts)
    if train.task == "text_classification":
        return TextClassification.of(train.classification, facts)
    kind = _load(train.task)
    try:
        task = kind(train, facts)
        missing = [part for part in _PARTS if not hasattr(task, part)]
    except StormjibError:
        raise
    except Exception as error:  # whatever a user's class raises
        raise ConfigError(
            f"train.task={train.task}: making it raised {type(error).__name__}: {error}. It is made with the `train` "
            "section and the facts of the dataset; mend the class."
        ) from error
    if missing:
        raise ConfigError(
            f"train.task={train.task} lacks {', '.join(missing)}. A task has what trainer.tasks.base.Task names."
        )
    return task


def _load(path: str) -> Callable[[TrainConfig, TaskFacts], Task]:
    """The class at `package.module:Class`."""
    module_name, _, name = path.partition(":")
    try:
        found: Callable[[TrainConfig, TaskFacts], Task] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"train.task={path}: {type(error).__name__}: {error}. Name a class as package.module:Class, in a module "
            "that is installed on every node, or lies in a folder that PYTHONPATH names."
        ) from error
    except StormjibError:
        raise
    except Exception as error:  # whatever a user's module raises when it is imported, a SyntaxError too
        raise ConfigError(
            f"train.task={path}: importing its module raised {type(error).__name__}: {error}. Mend the module."
        ) from error
    return found
