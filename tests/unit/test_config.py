"""The run file: what is accepted, what is refused, and that each message names file, line, key and fix."""

import pickle
import re
from pathlib import Path

import pytest
import yaml

from cluster.config import LaidOutConfig, RunConfig, dump_yaml, load_config
from data_service.config import default_source_name
from data_service.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "run: {name: reviews}\ndata:\n  sources: [{path: reviews.csv}]\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def message_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    message = str(caught.value)
    assert message.count("\n") < 12
    return message


def test_the_example_is_valid_and_its_paths_start_at_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(REPOSITORY / "examples" / "reviews.yaml")
    assert config.run.storage == str(REPOSITORY / "runs")
    assert config.data.sources[0].path == str(REPOSITORY / "examples" / "reviews.csv")
    assert config.root == f"{REPOSITORY}/runs/reviews-gpt"


def test_three_lines_are_a_run_and_every_default_is_visible(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, BASE))
    shown = yaml.safe_load(dump_yaml(config))
    for path in (
        "train.zero.stage",
        "model.from",
        "serve.replicas.min",
        "cluster.node.slots",
        "k8s.spot.node_selector",
    ):
        holder = shown
        for key in path.split("."):
            assert key in holder, path
            holder = holder[key]
    assert shown["train"]["parallel"] == {"dp": "auto", "pp": 1, "balance": "parameters"}
    assert config.train.auto_layout == {}


def test_what_is_shown_reads_back_as_the_same_run(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, BASE), ["model.num_layers=3", "train.steps=7"])
    again = tmp_path / "elsewhere"
    again.mkdir()
    assert load_config(write(again, dump_yaml(config))) == config
    assert RunConfig.model_validate(config.resolved()).digest() == config.digest()


def test_every_key_is_explained() -> None:
    def sections(section: type) -> list[type]:
        found = [section]
        for info in section.model_fields.values():
            inner = info.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                found += sections(inner)
        return found

    unexplained = [
        f"{section.__name__}.{name}"
        for section in sections(RunConfig)
        for name, info in section.model_fields.items()
        if not info.description
    ]
    assert unexplained == []


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("localhost:9000", "is not an address. Write it as https://HOST:PORT"),
        ("s3://bucket", "is not an address"),
        ("https://key:secret@s3.example", "it holds a user name or a password. Set AWS_ACCESS_KEY_ID"),
    ],
)
def test_an_address_of_a_store_is_one_and_holds_no_secret(tmp_path: Path, endpoint: str, expected: str) -> None:
    text = f"run: {{name: a, s3: {{endpoint_url: {endpoint!r}}}}}\ndata: {{sources: [{{path: x.csv}}]}}\n"
    with pytest.raises(ConfigError, match=re.escape(expected)) as raised:
        load_config(write(tmp_path, text))
    assert "run.s3.endpoint_url" in str(raised.value)
    assert ":secret@" not in str(raised.value)


@pytest.mark.parametrize(
    ("rest", "line", "expected"),
    [
        ("trian: {}\n", 4, "trian: unknown key. Did you mean train?"),
        ("train:\n  optimiser: {}\n", 5, "train.optimiser: unknown key. Did you mean optimizer?"),
        ("cluster: {zzz: 1}\n", 4, "cluster.zzz: unknown key. Valid here: address,"),
        ("train:\n  steps: many\n", 5, "train.steps='many': should be a valid integer"),
        ("train:\n  parallel:\n    dp: two\n", 6, "train.parallel.dp='two': should be a valid integer or 'auto'."),
        ("train:\n  micro_batch: 1.5\n", 5, "train.micro_batch=1.5: should be a valid integer or 'auto'."),
        ("train:\n  zero:\n    stage: 4\n", 6, "train.zero.stage=4: should be 0, 1, 2, 3 or 'auto'."),
        ("train:\n  parallel:\n    pp: 0\n", 6, "train.parallel.pp=0: should be greater than or equal to 1 or 'auto'."),
        ("train:\n  parallel:\n    pp: many\n", 6, "train.parallel.pp='many': should be a valid integer or 'auto'."),
        ("train:\n  recompute: all\n", 5, "train.recompute='all': should be 'none', 'blocks' or 'auto'."),
        (
            "train:\n  parallel: {pp: 2}\n  zero: {stage: auto, offload_parameters: cpu}\n",
            6,
            "train: zero.offload_parameters=cpu with parallel.pp=2",
        ),
        ("train:\n  parallel: {dp: 4, pp: auto}\n", 5, "train.parallel.dp=4 with train.parallel.pp=auto needs 4 slots"),
        ("train:\n  steps: 0\n", 5, "train.steps=0: should be greater than or equal to 1."),
        ("train:\n  optimizer: adamw\n", 5, "train.optimizer='adamw': should be a section"),
        ("train:\n  optimizer: {betas: [0.9]}\n", 5, "number 1 is missing"),
        ("train:\n  parallel: {pp: 2}\n  zero: {stage: 2}\n", 6, "train: zero.stage=2 with parallel.pp=2"),
        ("train:\n  zero: {stage: 0}\n  precision: bf16\n", 5, "without ZeRO there are no fp32 masters"),
        ("model:\n  num_layers: 2\n  num_heads: 7\n", 6, "model: num_heads=7 does not divide d_model=256"),
        ("serve:\n  host: 0.0.0.0\n", 5, "serve: host=0.0.0.0 is open beyond this machine"),
        ("cluster:\n  nodes: 2\n  min_nodes: 3\n", 6, "cluster: min_nodes=3 exceeds nodes=2"),
        ("train:\n  device: cuda\n", 5, "train.device=cuda with cluster.node.gpus=0"),
        ("train:\n  parallel:\n    pp: 9\n", 6, "train.parallel.pp=9 with model.num_layers=6"),
        ("train:\n  parallel: {dp: 4}\n", 5, "needs 4 slots, and cluster.nodes=1 with cluster.node.slots=1 gives 1"),
        ("serve:\n  kv_cache_tokens: 128\n", 5, "serve.kv_cache_tokens=128 is below data.seq_len=256"),
        ("run: {}\n", 4, "run appears twice (first on line 1)"),
        ("train: {steps: [}\n", 4, "not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, rest: str, line: int, expected: str) -> None:
    message = message_of(tmp_path, BASE + rest)
    assert f"{tmp_path}/run.yaml:{line}: " in message
    assert expected in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{path: a/x.csv}, {path: b/x.csv}]", "sources.1 and sources.0 are both named 'x'. Give each a name."),
        ("{path: a.csv, weight: 2}, {path: b.csv}]", "sources.0.weight is set and sources.1.weight is not"),
        ("{path: a.csv}]\n  skip: [{first: 5, end: 5}]", "first=5 with end=5"),
        ("{path: a.csv}]\n  skip: [{first: 5, end: 9}, {first: 7, end: 10}]", "begins before the one to 9 ends"),
        ("{path: a.csv}]\n  mixture: {changes: [{first_batch: 0, weights: {a: 1}}]}", "greater than or equal to 1"),
        ("{path: a.csv}]\n  mixture: {changes: [{first_batch: 3, weights: {b: 1}}]}", "names b, the sources are a"),
        ("{path: a.csv}]\n  mixture: {changes: [{first_batch: 3, weights: {a: 0}}]}", "one above 0"),
        (
            "{path: a.csv}]\n  mixture:\n    changes:\n"
            "      - {first_batch: 3, weights: {a: 1}}\n      - {first_batch: 3, weights: {a: 2}}",
            "begin at batches [3, 3]",
        ),
        ("{path: a.csv}]\n  service: {read_stall_s: 60}", "hedge_s=0.3, read_stall_s=60, stalled_s=60"),
        ("{path: a.csv}]\n  service: {address: [data]}", "address 'data' is not host:port"),
        ("{path: a.jsonl, messages: messages}]", "sources.0.messages with rows=stream"),
        ("{path: a.jsonl, messages: messages}]\n  rows: packed", "it has no chat template. Set data.chat_template"),
    ],
)
def test_data_that_contradict_themselves_are_refused(tmp_path: Path, data: str, expected: str) -> None:
    assert expected in message_of(tmp_path, f"run: {{name: a}}\ndata:\n  sources: [{data}\n")


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("run: {name: a}\ndata:\n  sources: [{paht: a.csv}]\n", ["path: required", "Did you mean path?"]),
        ("run: {name: a}\ndata:\n  sources: []\n", ["data.sources=[]: should have at least 1 item"]),
        ("run: {name: a}\ndata:\n  sources: a.csv\n", ["data.sources='a.csv': should be a list."]),
        ("run: {name: a}\ndata: null\n", ["data=None: should be a section"]),
        ("data:\n  sources: [{path: a.csv}]\n", ["run: required and not set. Add it."]),
        ("run: {name: A_b}\ndata:\n  sources: [{path: a.csv}]\n", ["'A_b' is not a run name"]),
    ],
)
def test_one_mistake_is_one_finding(tmp_path: Path, text: str, findings: list[str]) -> None:
    heading, *lines = message_of(tmp_path, text).splitlines()
    assert f"{len(findings)} problem" in heading
    assert len(lines) == len(findings)
    for line, finding in zip(lines, findings, strict=True):
        assert finding in line


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, BASE + "train: {steps: 5, global_batch: 4}\n")
    config = load_config(file, ["train.steps=9", "train.parallel.pp=1", "data.sources.0.path=s3://bucket/x.csv"])
    assert (config.train.steps, config.train.global_batch) == (9, 4)
    assert config.data.sources[0].path == "s3://bucket/x.csv"
    assert config.model.num_layers == RunConfig.model_fields["model"].default.num_layers


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "write it as dotted.key=value"),
        ("=3", "write it as dotted.key=value"),
        ("train.steps=[", "the value is not valid YAML"),
        ("data.sources.1.path=x.csv", "data.sources is a list of 1; 1 is not one of its positions"),
        ("data.sources.path=x.csv", "'path' is not one of its positions"),
        ("run.name.first=x", "run.name has no keys below it"),
        ("train.stepz=1", "override 'train.stepz=1': train.stepz: unknown key. Did you mean steps?"),
        ("train.steps=x", "override 'train.steps=x': train.steps='x'"),
        ("train.zero=null", "override 'train.zero=null': train.zero=None: should be a section"),
        ("train.parallel.pp=9", "override 'train.parallel.pp=9': train.parallel.pp=9 with model.num_layers=6"),
    ],
)
def test_a_mistake_in_an_override_is_named_with_the_override(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message_of(tmp_path, BASE, override)


def test_an_override_of_a_section_hides_the_lines_it_replaced(tmp_path: Path) -> None:
    text = BASE + "cluster:\n  node:\n    slots: 2\n    gpus: 2\n"
    assert "override 'cluster.node={slots: 2, gpus: 1}': cluster.node: gpus=1" in message_of(
        tmp_path, text, "cluster.node={slots: 2, gpus: 1}"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe", "not UTF-8 (byte 0)"),
        (b"- a\n", "a run file is a mapping of sections"),
        (b"", "a run file is a mapping of sections"),
        (b"run: &a {name: *a}\n", ":1: an alias stands inside what it names"),
    ],
)
def test_a_file_that_is_no_run_file_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: cannot read the run file \(No such file"):
        load_config(tmp_path / "none.yaml")


def test_paths_resolve_against_the_file_and_uris_stay(tmp_path: Path) -> None:
    text = (
        "run: {name: a, storage: runs}\ndata:\n  sources: [{path: s3://b/x.csv}, {path: zh/}, {path: en/*.jsonl.gz}]\n"
        "  tokenizer: {path: tok}\n  chat_template: chat.jinja\n  service: {cache_dir: shards}\n"
    )
    config = load_config(write(tmp_path, text), ["model.from=../base", "data.dataset=s3://b/dataset"])
    assert config.run.storage == f"{tmp_path}/runs"
    assert config.data.tokenizer.path == f"{tmp_path}/tok"
    assert config.model.from_ == f"{tmp_path.parent}/base"
    assert [source.path for source in config.data.sources] == [
        "s3://b/x.csv",
        f"{tmp_path}/zh",
        f"{tmp_path}/en/*.jsonl.gz",
    ]
    assert config.data.source_names == ("x", "zh", "en")
    assert config.data.chat_template == f"{tmp_path}/chat.jinja"
    assert config.data.service.cache_dir == f"{tmp_path}/shards"
    assert config.dataset_uri == "s3://b/dataset"


def test_the_identity_of_a_run_is_what_resuming_must_not_change(tmp_path: Path) -> None:
    file = write(tmp_path, BASE)
    identity = load_config(file).identity()
    for free in (
        *("train.parallel.pp=auto", "train.zero={stage: auto, offload_optimizer: auto}", "train.recompute=auto"),
        *("train.steps=9", "cluster.nodes=4", "train.zero.stage=2", "train.micro_batch=2", "serve.port=1"),
        "data.service={workers: 5, cache_bytes: 1, address: ['a:1'], metrics_port: 0}",
        "data.skip=[{first: 3, end: 5}]",
        "data.mixture.changes=[{first_batch: 7, weights: {reviews: 1}}]",
    ):
        assert load_config(file, [free]).identity() == identity, free
    for fixed in (
        *("run.seed=1", "data.seq_len=128", "model.num_layers=2", "train.global_batch=8"),
        *("data.rows=packed", "data.isolate_documents=true", "data.shuffle_window_shards=3"),
    ):
        assert load_config(file, [fixed]).identity() != identity, fixed


AUTO_LAYOUT = ["train.parallel.pp=auto", "train.recompute=auto", "train.zero={stage: auto, offload_parameters: auto}"]


def test_a_file_may_leave_its_layout_open_and_what_trains_takes_none_that_is(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, BASE), AUTO_LAYOUT)
    assert load_config(write(tmp_path, dump_yaml(config))) == config
    safe = config.train.auto_layout
    assert safe == {
        "train.parallel.pp": 1,
        "train.zero.stage": 1,
        "train.zero.offload_parameters": "none",
        "train.recompute": "none",
    }
    with pytest.raises(ConfigError, match=r"none that this run can have: train\.parallel\.pp: .*valid integer"):
        LaidOutConfig.of(config, {})
    decided = LaidOutConfig.of(config, safe)
    assert decided.train.auto_layout == {}
    assert decided.train == LaidOutConfig.of(load_config(write(tmp_path, BASE)), {}).train
    assert decided.identity() == config.identity()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"train.parallel.pp": 2, "train.zero.stage": 2}, "zero.stage=2 with parallel.pp=2"),
        ({"train.parallel.pp": 9, "train.zero.stage": 1}, "train.parallel.pp=9 with model.num_layers=6"),
        ({"train.parallel.pp": 6, "train.zero.stage": 1}, "cannot hold one pipeline of train.parallel.pp=6"),
        ({"train.parallel.pp": 1, "train.zero.stage": 0}, "zero.stage=0 with precision=bf16"),
        ({"train.parallel.pp": 1, "train.zero.stage": "auto"}, "train.zero.stage: Input should be 0, 1, 2 or 3"),
    ],
)
def test_a_layout_that_is_decided_is_checked_as_the_file_was(
    tmp_path: Path, keys: dict[str, int | str], expected: str
) -> None:
    file = write(tmp_path, BASE)
    more = ["train.recompute=none", "train.zero={stage: auto}", "train.precision=bf16"]
    config = load_config(file, [*AUTO_LAYOUT, *more, "cluster={nodes: 4, node: {slots: 2}}"])
    with pytest.raises(ConfigError, match=re.escape(expected)):
        LaidOutConfig.of(config, keys)


def test_a_run_cannot_be_changed_and_its_error_travels(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, BASE))
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1  # type: ignore[misc]
    error = ConfigError("train.steps=0: too few")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (ConfigError, str(error), 2)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("s3://bucket/zh-*.jsonl.gz", "zh"),
        ("corpora/en/*.jsonl", "en"),
        ("/data/reviews.csv", "reviews"),
        ("corpora/en/", "en"),
        ("*.csv", "source"),
    ],
)
def test_a_source_is_named_after_the_last_part_of_its_path_that_says_something(path, name):
    assert default_source_name(path) == name
