"""Evaluations as the run's folder keeps them: the record, how good it was, and what people read of it. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.protocol import EvalReport

__all__ = ["class_table", "evaluation_line", "evaluation_record", "scores_of"]


def evaluation_record(report: EvalReport) -> dict[str, Any]:
    """What metrics.jsonl holds of an evaluation, beside its step."""
    record: dict[str, Any] = {"loss": report.loss}
    if report.perplexity is None:
        record["rows"] = report.tokens
    else:
        record |= {"perplexity": report.perplexity, "tokens": report.tokens}
    if report.metrics:
        record |= {"metrics": report.metrics, "metric": report.metric, "better": report.better}
    return record


def scores_of(records: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """How good evaluations were, by step; lower is better.

    All are scored by the metric of the newest one, because a run that goes on may name another metric; those that do
    not have it have no score.
    """
    if not records:
        return {}
    newest = records[max(records)]
    metric, sign = newest.get("metric", "loss"), -1.0 if newest.get("better") == "higher" else 1.0
    values = {
        step: record["loss"] if metric == "loss" else record.get("metrics", {}).get(metric)
        for step, record in records.items()
    }
    return {step: sign * float(value) for step, value in values.items() if value is not None}


def evaluation_line(step: int, record: Mapping[str, Any]) -> str:
    """One line for people: the loss, the perplexity of a language model, and the task's metrics of the whole."""
    told = [f"held-out loss {record['loss']:.4f}"]
    if "perplexity" in record:
        told.append(f"perplexity {record['perplexity']:.2f}")
    told += [f"{name} {value:.4f}" for name, value in record.get("metrics", {}).items() if "/" not in name]
    return f"step {step}: {', '.join(told)}"


def class_table(record: Mapping[str, Any]) -> Iterator[str]:
    """Precision, recall, F1 and the confusion matrix by class, as lines; none where the task does not tell them."""
    metrics: Mapping[str, float] = record.get("metrics", {})
    named = (name.removeprefix("f1/") for name in metrics if name.startswith("f1/"))
    labels = [label for label in named if f"precision/{label}" in metrics and f"recall/{label}" in metrics]
    if not labels:
        return
    confusion = [f"confusion/{truth}/{said}" in metrics for truth in labels for said in labels]
    width = max(len("class"), *map(len, labels))
    columns = [label[:12] for label in labels] if all(confusion) else []
    yield f"{'class':<{width}}  precision  recall      f1" + "".join(
        f"  {'as ' + column:>{max(7, len(column) + 3)}}" for column in columns
    )
    for label in labels:
        cells = "".join(
            f"  {metrics[f'confusion/{label}/{said}']:>{max(7, len(column) + 3)}.0f}"
            for said, column in zip(labels, columns, strict=False)
        )
        shares = (
            f"{metrics[f'precision/{label}']:9.4f}  {metrics[f'recall/{label}']:6.4f}  {metrics[f'f1/{label}']:6.4f}"
        )
        yield f"{label:<{width}}  {shares}{cells}"
