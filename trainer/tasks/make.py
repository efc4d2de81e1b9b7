"""The task that a configuration names."""

from trainer.config import TrainConfig
from trainer.tasks.base import Task
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.facts import TaskFacts

__all__ = ["make_task"]


def make_task(train: TrainConfig, facts: TaskFacts) -> Task:
    """The task of `train.task`.

    Args:
        train: the `train` section.
        facts: of the dataset.
    """
    return CausalLM()
