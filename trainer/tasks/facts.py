"""What a task knows of the dataset before it sees a row. No torch here: it travels in a rank's specification."""

from dataclasses import dataclass

__all__ = ["TaskFacts"]


@dataclass(frozen=True)
class TaskFacts:
    """Facts of the prepared dataset."""

    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; empty where rows carry none."""
    label_rows: tuple[int, ...] = ()
    """Training documents of each class, in the same order; empty where nobody counted."""
    loss_masks: bool = False
    """Whether rows carry a mask of the labels that count (chats)."""
