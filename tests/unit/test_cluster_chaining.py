"""`model.from: run://…`: which checkpoint it means, and the copy that a run keeps."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.chaining import Reference, base_uri, check_base, choose_step, parse_reference, peek_base, with_base
from cluster.config import RunConfig, dump_yaml, load_config
from cluster.planning import unplanned
from cluster.run_store import RunFolder
from data_service.errors import ConfigError
from data_service.prepare import prepare
from tests.helpers.tiny_model import make_model_folder, train_tokenizer
from tests.helpers.written_parts import cut, make_state
from tests.unit.test_data_chat import CHATML
from trainer.checkpoint import write_part
from trainer.config import TrainConfig
from trainer.errors import CheckpointCorruptError
from trainer.export import Provenance, export_checkpoint, read_provenance
from trainer.fragments import Fragment
from trainer.initialise import initial_tensor
from trainer.manifest import commit, manifest_uri
from trainer.model import TransformerConfig, parameter_shapes
from trainer.tasks.paths import check_task_module

SHAPE = "model: {d_model: 16, num_layers: 1, num_heads: 2}\n"
STEPS = {10: 0.50, 20: 0.80, 30: 0.70}
"""Step to the macro-F1 of its evaluation."""
RAISES = "raise RuntimeError('no licence')"


@pytest.fixture
def first(tmp_path: Path) -> RunFolder:
    """A run that was trained: three checkpoints, evaluated by a metric of which more is better."""
    config = load_config(_write(tmp_path / "first.yaml", "first", SHAPE))
    folder = RunFolder(config.root)
    Path(folder.root, "dataset", "tokenizer").mkdir(parents=True)
    tokenizer = train_tokenizer(400)
    tokenizer.save(f"{folder.root}/dataset/tokenizer/tokenizer.json")
    Path(folder.config_uri).write_text(dump_yaml(config))
    shape = TransformerConfig.from_section(config.model, 400, 16)
    shapes = parameter_shapes(shape)
    lines = []
    for step, macro_f1 in STEPS.items():
        (own,) = cut(shapes, 1, seed=0)
        fragments = []
        for one in own:
            values = initial_tensor(one.name, shapes[one.name], step, shape).flatten()
            fragments.append(Fragment(one.name, one.kind, one.start, one.numel, values[one.start : one.stop]))
        receipt = write_part(folder.checkpoints_uri, step, 1, 0, fragments)
        commit(folder.checkpoints_uri, step, 1, [receipt], make_state(shapes, step, model=asdict(shape)))
        values = {"loss": 1.0 / step, "perplexity": 1.0, "tokens": 8, "metrics": {"macro_f1": macro_f1}}
        lines.append(json.dumps({"step": step, "eval": {**values, "metric": "macro_f1", "better": "higher"}}))
    Path(folder.metrics_uri).write_text("\n".join(lines) + "\n")
    return folder


def _write(file: Path, name: str, model: str) -> Path:
    file.write_text(
        f"run: {{name: {name}}}\ndata:\n  sources: [{{path: corpus.csv}}]\n  seq_len: 16\n{model}", encoding="utf-8"
    )
    return file


def _second(folder: Path, which: str) -> RunConfig:
    return load_config(_write(folder / "second.yaml", "second", f'model: {{from: "run://first{which}"}}\n'))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run://first", Reference("first", "best")),
        ("run://first@best", Reference("first", "best")),
        ("run://a-1@latest", Reference("a-1", "latest")),
        ("run://first@step=400", Reference("first", 400)),
        ("/models/tiny", None),
        (None, None),
    ],
)
def test_a_reference_is_read(text: str | None, expected: Reference | None) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text", ["run://", "run://first@worst", "run://first@step=", "run://first/best", "run://A@best"]
)
def test_a_garbled_reference_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="run://NAME@best"):
        load_config(_write(tmp_path / "run.yaml", "second", f'model: {{from: "{text}"}}\n'))


def test_best_is_by_the_tasks_own_metric(first: RunFolder) -> None:
    assert choose_step(first, "best") == 20, "its loss is not the lowest, its macro-F1 the highest"
    assert choose_step(first, "latest") == 30
    assert choose_step(first, 10) == 10
    with pytest.raises(ConfigError, match="names step 15 of the run .* are: 10, 20, 30"):
        choose_step(first, 15)


def test_the_weights_are_taken_once_and_kept(first: RunFolder, tmp_path: Path) -> None:
    said: list[str] = []
    config = _second(tmp_path, "@best")
    resolved = with_base(config, said.append)
    assert resolved.model.from_ == base_uri(config) == f"{tmp_path}/runs/second/base"
    assert "is step 20" in said[0]
    provenance = read_provenance(base_uri(config))
    assert provenance is not None
    assert provenance.step == 20
    shape = TransformerConfig.from_section(resolved.model, 400, 16)
    assert (shape.d_model, shape.num_layers, shape.vocab_size) == (16, 1, 400)
    assert Path(base_uri(config), "tokenizer.json").exists()
    shutil.rmtree(first.root)
    assert with_base(config, said.append) == resolved, "the other run may go"
    assert len(said) == 1
    assert config.model.from_ == "run://first@best", "the configuration says what was asked"


def test_what_is_missing_is_known_before_a_node_is_started(first: RunFolder, tmp_path: Path) -> None:
    check_base(_second(tmp_path, "@latest"))
    with pytest.raises(ConfigError, match="names step 11"):
        check_base(_second(tmp_path, "@step=11"))
    shutil.rmtree(first.root)
    with pytest.raises(ConfigError, match="there is no run in"):
        check_base(_second(tmp_path, "@latest"))


@pytest.mark.parametrize("task", ["no_such_package.tasks:Mine", "examples.no_such_module:Mine"])
def test_a_task_that_no_module_holds_is_known_early_too(task: str) -> None:
    check_task_module(TrainConfig(task="examples.ordinal_task:OrdinalClasses"))
    check_task_module(TrainConfig(task="sft"))
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        check_task_module(TrainConfig(task=task))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("__main__:Mine", "in a rank __main__ is another module"),
        ("a..b:Mine", "a..b"),
        ("broken_above.tasks:Mine", "looking for its module raised SyntaxError"),
        ("lacking_above.tasks:Mine", "raised ModuleNotFoundError: No module named 'not_installed'"),
        ("raising_above.tasks:Mine", "raised RuntimeError: no licence"),
    ],
)
def test_a_package_that_cannot_be_imported_is_no_traceback(
    task: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in [("broken", "def"), ("lacking", "import not_installed"), ("raising", RAISES)]:
        folder = tmp_path / f"{name}_above"
        folder.mkdir()
        (folder / "__init__.py").write_text(text)
        (folder / "tasks.py").write_text("class Mine: ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"train.task={re.escape(task)}: .*{re.escape(said)}"):
        check_task_module(TrainConfig(task=task))


def test_a_checkpoint_that_is_pruned_while_it_is_copied_is_chosen_again(
    first: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run still trains: the best of a moment ago is gone before its weights are read."""
    pruned: list[int] = []

    def prune_then_export(checkpoints_uri: str, step: int, *rest: str) -> Provenance:
        if len(pruned) < how_often:
            pruned.append(step)
            shutil.rmtree(Path(checkpoints_uri, f"step_{step:08d}"))
        return export_checkpoint(checkpoints_uri, step, *rest)

    monkeypatch.setattr("trainer.export.export_checkpoint", prune_then_export)
    how_often, said = 1, list[str]()
    with_base(_second(tmp_path, "@best"), said.append)
    assert pruned == [20]
    assert "is step 30" in said[0], "the best of what is left"
    assert read_provenance(base_uri(_second(tmp_path, "@best"))) is not None


def test_a_run_that_removes_every_choice_is_said_to_train_still(
    first: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []

    def gone(checkpoints_uri: str, step: int, *_: str) -> Provenance:
        chosen.append(step)
        Path(manifest_uri(checkpoints_uri, step)).unlink()
        raise FileNotFoundError(step)

    monkeypatch.setattr("trainer.export.export_checkpoint", gone)
    with pytest.raises(ConfigError, match="is still training"):
        with_base(_second(tmp_path, "@best"), print)
    assert chosen == [20, 30, 10]


def test_a_damaged_checkpoint_is_not_taken_for_a_pruned_one(first: RunFolder, tmp_path: Path) -> None:
    (part,) = Path(first.checkpoints_uri, "step_00000020").rglob("*.safetensors")
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(CheckpointCorruptError):
        with_base(_second(tmp_path, "@best"), print)


def test_a_plan_sees_the_shape_and_copies_nothing(first: RunFolder, tmp_path: Path) -> None:
    config = _second(tmp_path, "@best")
    with pytest.raises(ConfigError, match="has no export yet"):
        peek_base(config)
    export_checkpoint(first.checkpoints_uri, 30, first.export_uri(30), None)
    assert peek_base(config).model.from_ == first.export_uri(30)
    assert not Path(base_uri(config)).exists()
    with_base(config, print)
    assert peek_base(config).model.from_ == base_uri(config)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run in .*/runs/first"):
        with_base(_second(tmp_path, "@best"), print)


def test_a_folder_stays_as_it_is(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path / "run.yaml", "second", "model: {from: /models/tiny}\n"))
    assert with_base(config, print) is config


@pytest.mark.parametrize("which", ["", "@best", "@step=20"])
def test_a_tokenizer_of_another_run_is_found_below_the_storage(tmp_path: Path, which: str) -> None:
    """A run has one tokenizer, whichever step is named."""
    file = _with_tokenizer(tmp_path, f"run://first{which}")
    assert load_config(file).data.tokenizer.path == f"{tmp_path}/kept/first/dataset/tokenizer"


@pytest.mark.parametrize("text", ["run://", "run://first@worst", "run://first/dataset"])
def test_a_garbled_tokenizer_of_a_run_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer.path=.* Write run://NAME"):
        load_config(_with_tokenizer(tmp_path, text))


def _with_tokenizer(folder: Path, path: str) -> Path:
    file = folder / "run.yaml"
    data = f"data:\n  sources: [{{path: a.csv}}]\n  tokenizer: {{path: '{path}'}}\n"
    file.write_text(f"run: {{name: second, storage: ./kept}}\n{data}")
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {task: sft}\n", "no source holds chats"),
        ("train: {task: text_classification}\n", "rows must be texts with classes"),
        ("train: {lora: {rank: 4}}\n", "train.lora without model.from"),
        ("model: {family: bert}\n", "an encoder sees the tokens"),
        ("train: {task: sentiment}\n", "train.task"),
        ("model: {from: /m}\ntrain: {lora: {targets: []}}\n", "nothing would be trained"),
    ],
)
def test_what_a_task_needs_is_checked_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"run: {{name: second}}\ndata:\n  sources: [{{path: a.csv}}]\n{text}")
    with pytest.raises(ConfigError, match=said):
        load_config(file)


def test_the_two_files_of_the_example_belong_together() -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    first, second = (load_config(examples / f"sentiment_{name}.yaml") for name in ("pretrain", "finetune"))
    reference = parse_reference(second.model.from_)
    assert reference is not None
    assert (reference.run, first.run.storage) == (first.run.name, second.run.storage)
    assert second.data.tokenizer.path == f"{first.dataset_uri}/tokenizer"
    assert second.data.sources[0].path == first.data.sources[0].path
    assert second.data.split.eval == first.data.split.eval, "the same texts are held out"


def test_the_example_of_chats_reads_the_line_that_it_shows(tmp_path: Path) -> None:
    file = Path(__file__).resolve().parents[2] / "examples" / "sft_lora.yaml"
    config = load_config(file)
    assert config.data.tokenizer.path == config.model.from_ == str(file.parent / "SmolLM2-135M-Instruct")
    assert config.train.lora is not None
    (shown,) = [line for line in file.read_text().splitlines() if line.startswith('# {"')]
    (tmp_path / "chats.jsonl").write_text(shown.removeprefix("# ") + "\n", encoding="utf-8")
    (tmp_path / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    base = make_model_folder(tmp_path / "base")
    here = [f"model.from={base}", f"data.tokenizer.path={base}", f"data.sources.0.path={tmp_path / 'chats.jsonl'}"]
    here += [f"data.chat_template={tmp_path / 'chatml.jinja'}", "data.split.eval=0", f"run.storage={tmp_path / 'runs'}"]
    config = load_config(file, here)
    dataset = prepare(config.data, config.dataset_uri)
    assert (dataset.num_documents("train"), dataset.num_rejects) == (1, 0)
    assert dataset.loss_masks, "the loss is on the answer alone"
    assert unplanned(config) is not None, "so the file states its micro-batch"


def test_the_example_s_reviews_are_written_where_its_files_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import sentiment

    examples = Path(__file__).resolve().parents[2] / "examples"
    named = load_config(examples / "sentiment_pretrain.yaml").data.sources[0].path
    assert Path(named) == examples / "sentiment" / "train.csv", "what the command in the file names"
    assert "--write examples/sentiment/train.csv" in (examples / "sentiment_pretrain.yaml").read_text()
    monkeypatch.setattr("sys.argv", ["sentiment", "--write", str(tmp_path / "new" / "train.csv"), "--limit", "50"])
    sentiment.main()
    lines = (tmp_path / "new" / "train.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "text,label"
    assert "40 reviews; 10 more are set aside" in capsys.readouterr().out
    train, test = sentiment.divide(sentiment.read_reviews(), 0, 50)
    assert not {text for text, _ in train} & {text for text, _ in test}
