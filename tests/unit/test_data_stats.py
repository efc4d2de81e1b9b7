"""`stormjib data stats` and `stormjib data show`, through the command line, against an independent count."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from cluster.config import load_config
from cluster.run_data import order_of
from data_service.audit import SampleAudit
from data_service.counts import SplitCounts, length_counts
from data_service.manifest import DatasetManifest, read_manifest
from data_service.order import rows_of_batch
from data_service.plan import part_of_rows
from data_service.planning import make_plan
from data_service.row_view import rows_of_step

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STEPS = 40


def stormjib(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices("sail wind sea storm jib mast rope 船 海 风".split(), k=count))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run over text, with duplicates and rejects, and chats."""
    folder = tmp_path_factory.mktemp("run")
    draw = random.Random(0)
    texts = [f"{words(draw, draw.randint(1, 70))} {number}" for number in range(200)]
    records = [json.dumps({"text": text}, ensure_ascii=False) for text in [*texts, *texts[:7], "\x1b[31mred\x9b"]]
    (folder / "web.jsonl").write_text("\n".join([*records, "no json", '{"text": ""}', '{"text": 5}']) + "\n")
    chats = [
        [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": words(draw, 6)}]
        for number in range(60)
    ]
    chats.append([{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "no"}])
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (folder / "chatml.jinja").write_text(CHATML)
    path = folder / "run.yaml"
    path.write_text(
        f"""
run: {{name: small, storage: ./runs, seed: 3}}
cluster: {{address: local, nodes: 1, node: {{slots: 2}}}}
data:
  sources: [{{path: web.jsonl, weight: 3}}, {{path: chat.jsonl, messages: messages, weight: 1}}]
  mixture: {{changes: [{{first_batch: 17, weights: {{web: 1, chat: 2}}}}]}}
  skip: [{{first: 3, end: 5}}, {{first: 15, end: 20}}]
  tokenizer: {{train: {{vocab_size: 330}}}}
  chat_template: chatml.jinja
  rows: packed
  seq_len: 48
  isolate_documents: true
  shard_tokens: 1024
  split: {{eval: 0.1}}
model: {{d_model: 32, num_layers: 2, num_heads: 2}}
train: {{global_batch: 8, steps: {STEPS}}}
serve: {{port: 0}}
"""
    )
    prepared = stormjib("prepare", str(path), "--processes", "1")
    assert prepared.returncode == 0, prepared.stderr
    return path


@pytest.fixture(scope="module")
def manifest(run: Path) -> DatasetManifest:
    return read_manifest(load_config(run, []).dataset_uri)


@pytest.fixture(scope="module")
def stats(run: Path) -> dict[str, Any]:
    done = stormjib("data", "stats", str(run), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def shown(run: Path, *arguments: str) -> dict[str, Any]:
    done = stormjib("data", "show", str(run), "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_records_duplicates_and_rejects_are_counted_per_source(stats: dict[str, Any]) -> None:
    web, chat = stats["sources"]
    assert (web["source"], web["files"], web["records"], web["duplicates"]) == ("web", 1, 211, 7)
    assert web["rejects"] == sum(web["reject_reasons"].values()) == 3
    assert (chat["source"], chat["records"], chat["rejects"]) == ("chat", 61, 1)
    assert chat["reject_reasons"] == {"control token": 1}
    assert sum(split["documents"] for split in web["splits"].values()) == 201
    assert sum(split["documents"] for split in chat["splits"].values()) == 60


def test_lengths_are_those_of_the_documents(run: Path, stats: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_file(str(run.parent / "runs/small/dataset/tokenizer/tokenizer.json"))
    tokenizer.encode_special_tokens = True
    texts = {json.loads(line)["text"] for line in (run.parent / "web.jsonl").read_text().splitlines()[:208]}
    lengths = sorted(len(tokenizer.encode(text).ids) + 1 for text in texts)
    web = stats["sources"][0]["splits"]
    assert web["train"]["tokens"] + web["eval"]["tokens"] == sum(lengths)
    assert web["train"]["bytes"] + web["eval"]["bytes"] == sum(len(text.encode()) for text in texts)
    found = Counter()
    for split in web.values():
        assert split["lengths"]["mean"] == pytest.approx(split["tokens"] / split["documents"])
        found.update(dict(split["lengths"]["histogram"]))
    assert +found == Counter(2 ** (length.bit_length() - 1) for length in lengths)
    assert min(split["lengths"]["min"] for split in web.values()) == lengths[0]
    longest = max(split["lengths"]["max"] for split in web.values())
    assert longest <= lengths[-1] <= longest * 1.04


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_known_to_three_percent(seed: int) -> None:
    lengths = np.maximum(1, np.random.default_rng(seed).lognormal(6, 1.5, 5000)).astype(np.uint32)
    counts = SplitCounts(lengths.size, int(lengths.sum()), 0, length_counts(lengths))
    from data_service.stats import _lengths

    found = _lengths(counts)
    assert found is not None
    assert found.min == lengths.min()
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0)):
        exact = float(np.quantile(lengths, share, method="inverted_cdf"))
        assert exact * 0.968 <= getattr(found, name) <= exact


def test_the_mixture_is_what_the_order_draws(run: Path, manifest: DatasetManifest, stats: dict[str, Any]) -> None:
    plan = make_plan(manifest, "train", order_of(load_config(run, [])))
    drawn: Counter[str] = Counter()
    by_segment: dict[int, Counter[str]] = {0: Counter(), 17: Counter()}
    for step in range(STEPS):
        for row_id in rows_of_batch(plan, step).tolist():
            source = plan.parts[part_of_rows(row_id)[0]].source
            drawn[source] += 1
            by_segment[0 if plan.batch_at(step) < 17 else 17][source] += 1
    mixture = stats["mixture"]
    assert mixture["rows"] == dict(drawn)
    assert mixture["skipped_batches"] == 7
    assert mixture["shares"] == {name: pytest.approx(count / (8 * STEPS)) for name, count in drawn.items()}
    sizes = {part.source: part.num_rows for part in plan.parts}
    assert mixture["epochs"] == {name: pytest.approx(count / sizes[name]) for name, count in drawn.items()}
    first, second = mixture["segments"]
    assert (first["first_batch"], first["end_batch"], second["first_batch"], second["end_batch"]) == (0, 17, 17, None)
    assert first["shares"] == {"web": pytest.approx(0.75), "chat": pytest.approx(0.25)}
    assert second["shares"] == {"web": pytest.approx(1 / 3), "chat": pytest.approx(2 / 3)}
    assert [one["rows"] for one in (first, second)] == [dict(counts) for counts in by_segment.values()]
    assert {one["source"]: one["splits"]["train"]["rows"] for one in stats["sources"]} == sizes


def test_a_run_of_no_more_steps_than_the_first_weights(run: Path) -> None:
    done = stormjib("data", "stats", str(run), "--json", "train.steps=2", "data.mixture.changes=[]", "data.skip=[]")
    assert done.returncode == 0, done.stderr
    mixture = json.loads(done.stdout)["mixture"]
    assert sum(mixture["rows"].values()) == 16
    assert (len(mixture["segments"]), mixture["skipped_batches"]) == (1, 0)


def test_stats_read_as_text(run: Path) -> None:
    done = stormjib("data", "stats", str(run))
    assert done.returncode == 0, done.stderr
    for part in (
        "packed rows of 48 tokens",
        "web: 1 files, 211 records; left out: 7 duplicates, 3 rejected",
        "control token",
        "40 steps draw 320 rows, 7 batches skipped",
        "batches 0 to 16: web 75.00%, chat 25.00%",
        "batches 17 on: web 33.33%, chat 66.67%",
    ):
        assert part in done.stdout


def test_the_rows_of_a_step_are_those_that_are_trained_on(run: Path, manifest: DatasetManifest) -> None:
    config = load_config(run, [])
    plan = make_plan(manifest, "train", order_of(config))
    audit = SampleAudit(config.dataset_uri, plan, manifest, 1 << 20)
    try:
        for step in (1, 5):
            found = shown(run, "--step", str(step))
            assert found["sample_hash"] == audit.expected(step - 1)
            assert found["batch"] == plan.batch_at(step - 1) == {1: 0, 5: 6}[step]
            assert [row["row_id"] for row in found["rows"]] == rows_of_batch(plan, step - 1).tolist()
            assert [row["slot"] for row in found["rows"]] == list(range(8))
    finally:
        audit.close()


def test_text_is_whole_documents_and_what_counts_is_marked(run: Path) -> None:
    texts = {json.loads(line)["text"] for line in (run.parent / "web.jsonl").read_text().splitlines()[:208]}
    chats = {
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in json.loads(line)["messages"]): m_last
        for line in (run.parent / "chat.jsonl").read_text().splitlines()
        for m_last in [json.loads(line)["messages"][-1]["content"]]
    }
    seen = Counter()
    for step in (1, 2, 30):
        for row in shown(run, "--step", str(step))["rows"]:
            assert "".join(piece["text"] for piece in row["pieces"]) == row["text"]
            starts = [piece["first"] for piece in row["pieces"] if piece["starts_document"]]
            assert starts == row["document_starts"]
            assert (run.parent / "runs/small/dataset" / row["shard"]).is_file()
            seen[row["source"]] += 1
            documents = [text for text in row["text"].split("<|endoftext|>") if text]
            if row["source"] == "web":
                assert row["num_labels"] == row["length"] - len([start for start in starts if start]) - 1
                if row["document_starts"][:1] == [0] and row["length"] < 49:
                    assert set(documents) <= texts
            elif row["length"] < 49:
                assert set(documents) <= set(chats)
                said = [piece["text"] for piece in row["pieces"] if piece["counts"]]
                assert said == [chats[document] + "<|im_end|>" for document in documents]
    assert min(seen["web"], seen["chat"]) > 0


def test_a_step_reads_as_text_without_what_a_terminal_would_act_on(run: Path, manifest: DatasetManifest) -> None:
    done = stormjib("data", "show", str(run), "--step", "5", "--slots", "2:4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "step 5 (train): global batch 6, slots 2 to 3 of 8"
    assert [line.split(":")[0] for line in lines if line.startswith("slot ")] == ["slot 2", "slot 3"]
    config = load_config(run, [])
    plans = {split: make_plan(manifest, split, order_of(config)) for split in ("train", "eval")}
    steps = [("train", step) for step in range(200)] + [("eval", step) for step in range(plans["eval"].num_batches)]
    split, step = next(
        (split, step)
        for split, step in steps
        for row in rows_of_step(config.dataset_uri, manifest, plans[split], step)
        if "\x1b[31mred\x9b" in row.text
    )
    done = stormjib("data", "show", str(run), "train.steps=200", "--split", split, "--step", str(step + 1))
    assert "\\x1b[31mred\\x9b" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\x9b" not in done.stdout


def test_the_evaluation_split_ends(run: Path, manifest: DatasetManifest) -> None:
    plan = make_plan(manifest, "eval", order_of(load_config(run, [])))
    last = shown(run, "--split", "eval", "--step", str(plan.num_batches))
    assert len(last["rows"]) == plan.num_rows - 8 * (plan.num_batches - 1)
    assert all(row["shard"].startswith("shards/eval-") for row in last["rows"])
    done = stormjib("data", "show", str(run), "--split", "eval", "--step", str(plan.num_batches + 1))
    assert done.returncode == 2
    assert f"{plan.num_batches} batches" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["show"], ("--step N",)),
        (["show", "--step", "0"], ("steps count from 1",)),
        (["show", "--step", "41"], ("--step 41", "train.steps=40")),
        (["show", "--step", "1", "--slots", "5:3"], ("--slots 5:3", "slots 0 to 7")),
        (["show", "--step", "1", "--slots", "a"], ("--slots a", "slots 0 to 7")),
        (["show", "--step", "1", "--slots", "0:9"], ("--slots 0:9",)),
        (["stats", "--step", "1"], ("--step", "data show")),
        (["stats", "data.dataset=/nowhere"], ("/nowhere", "stormjib prepare")),
        (["stats", "data.seq_len=64"], ("data.seq_len=64", "data.seq_len=48")),
        (["look"], ("invalid choice", "stats")),
    ],
)
def test_a_mistake_is_named(run: Path, arguments: list[str], parts: tuple[str, ...]) -> None:
    done = stormjib("data", arguments[0], str(run), *arguments[1:])
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_classes_are_named_and_counted(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("text,label\n" + "".join(f"text {i} of it,{'ab'[i % 2]}\n" for i in range(40)))
    (tmp_path / "run.yaml").write_text(
        """
run: {name: small, storage: ./runs}
data:
  sources: [{path: c.csv, label: label}]
  tokenizer: {train: {vocab_size: 300}}
  rows: document
  seq_len: 12
  split: {eval: 0.0}
model: {d_model: 32, num_layers: 2, num_heads: 2}
train: {global_batch: 4, steps: 3}
"""
    )
    assert stormjib("prepare", str(tmp_path / "run.yaml"), "--processes", "1").returncode == 0
    text = stormjib("data", "stats", str(tmp_path / "run.yaml"))
    assert "class a: 20" in text.stdout
    assert "eval: no documents" in text.stdout
    for row in shown(tmp_path / "run.yaml", "--step", "2")["rows"]:
        assert row["label"] == "ab"[int(row["text"].split()[1]) % 2]
        assert row["document_starts"] == [0]
    assert stormjib("data", "show", str(tmp_path / "run.yaml"), "--step", "1", "--split", "eval").returncode == 2


def test_neither_command_needs_torch_or_ray(run: Path) -> None:
    for arguments in (["stats", str(run)], ["show", str(run), "--step", "1"]):
        code = (
            "import sys\nfrom cluster.cli import main\n"
            f"assert main(['data', *{arguments!r}]) == 0\n"
            "print('loaded:', *[name for name in ('torch', 'ray', 'deepspeed', 'transformers') if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.splitlines()[-1] == "loaded:"
