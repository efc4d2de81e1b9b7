"""What the folder keeps of an evaluation, how evaluations are ranked, and what people read."""

import torch

from cluster.evaluations import class_table, evaluation_line, evaluation_record, scores_of
from cluster.run_store import StepHistory
from trainer.protocol import EvalReport
from trainer.tasks.text_classification import classification_metrics

METRICS = classification_metrics(torch.tensor([[8, 2], [1, 9]]), ("bad", "very good"))


def test_a_language_model_is_ranked_by_loss_and_told_by_perplexity() -> None:
    record = evaluation_record(EvalReport(20, 2.0, 7.389, 640))
    assert record == {"loss": 2.0, "perplexity": 7.389, "tokens": 640}
    assert scores_of({20: record}) == {20: 2.0}
    assert evaluation_line(20, record) == "step 20: held-out loss 2.0000, perplexity 7.39"
    assert list(class_table(record)) == []


def test_chats_tell_how_many_tokens_are_right_beside() -> None:
    record = evaluation_record(EvalReport(20, 2.0, 7.389, 640, {"token_accuracy": 0.25}))
    assert scores_of({20: record}) == {20: 2.0}
    assert evaluation_line(20, record).endswith("perplexity 7.39, token_accuracy 0.2500")


def test_a_classifier_is_ranked_by_its_metric_and_told_by_class() -> None:
    report = EvalReport(20, 0.5, None, 20, METRICS, metric="macro_f1", better="higher")
    record = evaluation_record(report)
    assert record["rows"] == 20
    assert "perplexity" not in record
    assert scores_of({20: record}) == {20: -METRICS["macro_f1"]}
    line = evaluation_line(20, record)
    assert "accuracy 0.8500" in line
    assert "macro_f1 0.8496" in line
    assert "perplexity" not in line
    assert "confusion" not in line
    header, bad, good = class_table(record)
    assert header.split() == ["class", "precision", "recall", "f1", "as", "bad", "as", "very", "good"]
    assert bad.split() == ["bad", "0.8889", "0.8000", "0.8421", "8", "2"]
    assert good.split() == ["very", "good", "0.8182", "0.9000", "0.8571", "1", "9"]


def test_the_better_of_two_evaluations_has_the_lower_score_whichever_way_the_metric_goes() -> None:
    def record(loss: float, macro_f1: float) -> dict[str, object]:
        return {"loss": loss, "metrics": {"macro_f1": macro_f1}, "metric": "macro_f1", "better": "higher"}

    history = StepHistory(steps=(), evals={10: record(0.4, 0.7), 20: record(0.6, 0.8)})
    assert min(history.scores, key=history.scores.__getitem__) == 20
    plain = StepHistory(steps=(), evals={10: {"loss": 0.4}, 20: {"loss": 0.6}})
    assert min(plain.scores, key=plain.scores.__getitem__) == 10


def test_a_classifier_that_is_ranked_by_its_loss_has_no_perplexity_either() -> None:
    record = evaluation_record(EvalReport(20, 0.5, None, 20, METRICS))
    assert scores_of({20: record}) == {20: 0.5}
    assert "perplexity" not in evaluation_line(20, record)


def test_all_evaluations_are_scored_by_the_metric_of_the_newest() -> None:
    """A run that goes on may name another metric; a loss is not compared with an F1."""

    def record(loss: float, metric: str, **metrics: float) -> dict[str, object]:
        return {"loss": loss, "metrics": metrics, "metric": metric, "better": "lower" if metric == "loss" else "higher"}

    first, second = record(0.4, "macro_f1", macro_f1=0.7, accuracy=0.9), record(0.6, "accuracy", accuracy=0.8)
    assert scores_of({10: first, 20: second}) == {10: -0.9, 20: -0.8}
    assert scores_of({10: first, 20: second, 30: record(0.5, "loss")}) == {10: 0.4, 20: 0.6, 30: 0.5}
    assert scores_of({0: {"loss": 0.7}, 10: first}) == {10: -0.7}, "what has no such metric has no score"
    assert scores_of({}) == {}


def test_a_task_that_tells_f1_alone_has_no_table() -> None:
    record = evaluation_record(EvalReport(20, 0.5, None, 20, {"f1/x": 0.5}, metric="f1/x", better="higher"))
    assert list(class_table(record)) == []
