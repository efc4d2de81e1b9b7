"""What fits the data: the size of a model, the number of epochs, the task and the family. Advice, not rules.

Sources: Hoffmann et al. 2022 ("Training Compute-Optimal Large Language Models", table 3) for some 20 tokens a parameter
at the best loss for the compute; Muennighoff et al. 2023 ("Scaling Data-Constrained Language Models", section 1) for
epochs: up to 4 are worth almost as much as new tokens, beyond 16 nothing is gained.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DataFacts", "advise"]

TOKENS_PER_PARAMETER = 20
WORTHWHILE_EPOCHS = 4
LAST_USEFUL_EPOCHS = 16
_SMALL_CORPUS_TOKENS = 50_000_000
"""Below it a model from scratch learns little of a language; a pretrained one is the better start."""


@dataclass(frozen=True)
class DataFacts:
    """What a manifest and a run say of the data."""

    tokens: int
    """Training tokens of one epoch."""
    documents: int
    epochs: float
    """That the run makes."""
    labels: int
    """Classes of the documents; 0 without."""
    chats: bool
    """Whether rows mark the assistant's words."""
    task: str
    """`train.task`."""
    family: Literal["llama", "qwen2", "qwen3", "gpt2", "bert"]
    parameters: int
    pretrained: bool
    """Whether the model starts from weights (`model.from`)."""
    tokens_seen: int
    """In all steps of the run, padding included."""


def advise(facts: DataFacts) -> list[str]:
    """One line for each thing that is worth a thought; none where all is well."""
    return [*_size(facts), *_epochs(facts), *_task(facts)]


def _size(facts: DataFacts) -> list[str]:
    if facts.pretrained:
        return []
    ratio = facts.tokens_seen / max(1, facts.parameters)
    best = facts.tokens_seen // TOKENS_PER_PARAMETER
    lines = []
    if ratio < TOKENS_PER_PARAMETER / 2:
        usable = facts.tokens * WORTHWHILE_EPOCHS // TOKENS_PER_PARAMETER
        lines.append(
            f"size: {ratio:.1f} tokens a parameter; {TOKENS_PER_PARAMETER} give the best loss for the compute "
            f"(Hoffmann et al. 2022). Train some {facts.parameters * TOKENS_PER_PARAMETER:,} tokens, or a model of "
            f"{best:,} parameters; these data carry {usable:,} in {WORTHWHILE_EPOCHS} epochs."
        )
    elif ratio > TOKENS_PER_PARAMETER * 10:
        lines.append(
            f"size: {ratio:,.0f} tokens a parameter: a larger model, of some {best:,} parameters, would reach a lower "
            "loss with the same compute (Hoffmann et al. 2022); keep this one where serving must be cheap."
        )
    if facts.tokens < _SMALL_CORPUS_TOKENS:
        lines.append(
            f"size: {facts.tokens:,} training tokens are few for a model from scratch; start from pretrained weights "
            "(model.from) where one knows the language."
        )
    return lines


def _epochs(facts: DataFacts) -> list[str]:
    limits = "(Muennighoff et al. 2023)"
    if facts.epochs > LAST_USEFUL_EPOCHS:
        return [
            f"epochs: {facts.epochs:.1f}; beyond {LAST_USEFUL_EPOCHS} repeating gains nothing {limits}. Lower "
            "train.steps, or add data."
        ]
    if facts.epochs > WORTHWHILE_EPOCHS and not facts.pretrained:
        return [
            f"epochs: {facts.epochs:.1f}; beyond {WORTHWHILE_EPOCHS} repeated tokens are worth less than new ones "
            f"{limits}."
        ]
    if facts.epochs > WORTHWHILE_EPOCHS:
        return [f"epochs: {facts.epochs:.1f} of fine-tuning; watch the held-out loss, and keep the best checkpoint."]
    return []


def _task(facts: DataFacts) -> list[str]:
    lines = []
    if facts.labels and facts.task == "causal_lm":
        lines.append(
            f"task: documents carry {facts.labels} classes; train.task=text_classification learns them. With few "
            "labels pre-train on the text first, then start the classifier from that run (model.from=run://NAME@best)."
        )
    if facts.chats and facts.task == "causal_lm":
        lines.append("task: rows are chats; train.task=sft takes the loss on the assistant's words only.")
    if facts.task == "sft" and not facts.chats:
        lines.append(
            "task: sft on rows without a mask of answers is causal_lm; give sources with `messages` for chats."
        )
    if facts.task == "text_classification" and not facts.labels:
        lines.append(
            "task: text_classification on documents without classes; name their column (data.sources.*.label)."
        )
    if facts.task == "text_classification" and facts.family != "bert" and not facts.pretrained:
        lines.append(
            "family: for classes alone an encoder (model.family=bert) sees a row from both sides; a decoder is the "
            "choice where the same model also writes, or was pre-trained on this text."
        )
    if facts.task != "text_classification" and facts.family == "bert":
        lines.append("family: bert is an encoder and does not write; take llama, qwen3 or gpt2 for this task.")
    return lines
