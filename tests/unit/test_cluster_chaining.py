"""`model.from: run://…`: which checkpoint it means, and the copy that a run keeps."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.chaining import Reference, base_uri, check_base, choose_step, parse_reference, peek_base, with_base
from cluster.config import RunConfig, dump_yaml, load_config
from cluster.run_store import RunFolder
from data_service.errors import ConfigError
from tests.helpers.tiny_model import train_tokenizer
from tests.helpers.written_parts import cut, make_state
from trainer.checkpoint import write_part
from trainer.config import TrainConfig
from trainer.export import export_checkpoint, read_provenance
from trainer.fragments import Fragment
from trainer.initialise import initial_tensor
from trainer.manifest import commit
from trainer.model import TransformerConfig, parameter_shapes
from trainer.tasks.paths import check_task_module

SHAPE = "model: {d_model: 16, num_layers: 1, num_heads: 2}\n"
STEPS = {10: 0.50, 20: 0.80, 30: 0.70}
"""Step to the macro-F1 of its evaluation."""


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


def test_a_tokenizer_of_another_run_is_found_below_the_storage(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "run: {name: second, storage: ./kept}\ndata:\n  sources: [{path: a.csv}]\n  tokenizer: {path: 'run://first'}\n"
    )
    assert load_config(file).data.tokenizer.path == f"{tmp_path}/kept/first/dataset/tokenizer"


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
