"""What the planner is asked for a run, what it refuses, and what it leaves alone."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import planning
from cluster.cli import main
from cluster.config import LaidOutConfig, RunConfig, load_config
from cluster.machine_memory import container_bytes
from cluster.node_pool import NodePool
from cluster.planning import check_fits, laid_out, plan_task
from data_service.errors import ConfigError
from data_service.manifest import DatasetManifest
from data_service.prepare import prepare
from tests.helpers.runs import write_run
from tests.helpers.tiny_model import make_model_folder
from trainer.deepspeed_config import resolve_precision

GIB = 2**30


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(planning, "machine_bytes", lambda: 24 * GIB)
    return write_run(tmp_path)


@pytest.fixture
def dataset(file: Path) -> DatasetManifest:
    config = load_config(file)
    return prepare(config.data, config.dataset_uri)


def laid(config: RunConfig, dataset: DatasetManifest) -> tuple[int | str, list[str]]:
    said: list[str] = []
    return laid_out(config, dataset, said.append).train.micro_batch, said


def test_a_runs_own_micro_batch_and_offload_stay_and_are_not_refused(file: Path, dataset: DatasetManifest) -> None:
    found, said = laid(load_config(file, ["train.micro_batch=3"]), dataset)
    assert found == 3
    assert said[0].startswith("planned: micro-batches of 3 rows")
    offloaded = ["train.zero.offload_optimizer=cpu", "train.zero.stage=2"]
    found, said = laid(load_config(file, offloaded), dataset)
    assert isinstance(found, int)
    assert "planned" in said[0]


@pytest.mark.parametrize("where", ["cluster.address=10.0.0.1:6379", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"])
def test_on_a_ray_that_is_joined_nothing_is_known_and_nothing_refused(
    file: Path, dataset: DatasetManifest, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [where] if "=" in where else ["cluster.address=auto"]
    if "=" not in where:
        monkeypatch.setitem(os.environ, where, "10.0.0.1:6379")
    for more in (["train.micro_batch=6"], ["train.zero.offload_optimizer=cpu"]):
        config = load_config(file, [*overrides, *more])
        assert plan_task(config, dataset.vocab_size, 0).shared_bytes is None
        found, said = laid(config, dataset)
        assert found == config.train.micro_batch  # `auto` stays, and follows the mesh after a loss
        assert "planned" in said[0]


AUTO = ["train.parallel.pp=auto", "train.recompute=auto"]
AUTO += [f"train.zero.{key}=auto" for key in ("stage", "offload_optimizer", "offload_parameters")]
GPUS = "cluster.node={slots: 2, gpus: 2}"


def decided(config: RunConfig, dataset: DatasetManifest) -> tuple[LaidOutConfig, dict[str, int | str], str]:
    """The run, its layout by key, and all that was said."""
    said: list[str] = []
    found = laid_out(config, dataset, said.append)
    zero = found.train.zero
    layout = {
        "pp": found.train.parallel.pp,
        "stage": zero.stage,
        "offload": f"{zero.offload_optimizer} {zero.offload_parameters}",
        "recompute": found.train.recompute,
    }
    return found, layout, "\n".join(said)


def test_auto_is_the_row_that_the_planner_takes_and_the_console_tells_it(file: Path, dataset: DatasetManifest) -> None:
    config = load_config(file, AUTO)
    found, layout, said = decided(config, dataset)
    row = check_fits(plan_task(config, dataset.vocab_size, 0))
    assert layout == {"pp": 1, "stage": 0, "offload": "none none", "recompute": "none"}  # least traffic, memory enough
    assert (layout["pp"], layout["stage"]) == (row.setting.pp, row.setting.zero_stage)
    assert found.train.micro_batch == row.layout.micro_batch
    assert found.train.parallel.dp == "auto"  # it follows the slots, before and after a loss
    assert said.startswith("planned: train.parallel.pp=1 train.zero.stage=0 train.zero.offload_optimizer=none ")
    assert "train.recompute=none, micro-batches of" in said
    assert check_fits(plan_task(found, dataset.vocab_size, 0)).setting == row.setting


def test_what_the_file_fixes_stays_beside_auto(file: Path, dataset: DatasetManifest) -> None:
    _, layout, said = decided(load_config(file, [*AUTO, "train.parallel.pp=2", "train.recompute=blocks"]), dataset)
    assert layout == {"pp": 2, "stage": 1, "offload": "none none", "recompute": "blocks"}
    assert "train.parallel.pp" not in said
    found, layout, _ = decided(load_config(file, [*AUTO, "train.zero.stage=3", "train.micro_batch=3"]), dataset)
    assert (layout["pp"], layout["stage"], found.train.micro_batch) == (1, 3, 3)
    nothing = load_config(file, ["train.micro_batch=4"])
    assert decided(nothing, dataset)[0].resolved() == nothing.resolved()


def test_a_run_that_fits_with_means_alone_gets_them(
    file: Path, dataset: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_own_gpu", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(planning, "machine_bytes", lambda: 4000 * GIB)
    shape = ["model.d_model=8192", "model.num_layers=12", "model.num_heads=64", "data.seq_len=2048"]
    config = load_config(file, [GPUS, *AUTO, *shape, "serve.kv_cache_tokens=4096"])
    found, layout, said = decided(config, dataset)
    assert layout["offload"] != "none none"
    assert resolve_precision(found.train, "cuda") == "bf16" == resolve_precision(config.train, "cuda")
    plain = load_config(file, [GPUS, *shape, "serve.kv_cache_tokens=4096"])
    with pytest.raises(ConfigError, match="This fits"):
        decided(plain, dataset)
    assert "cpu" in said


SAFE = {"pp": 1, "stage": 1, "offload": "none none", "recompute": "none"}


@pytest.mark.parametrize(
    ("overrides", "gpu", "why"),
    [
        (["train.task=examples.ordinal_task:OrdinalClasses"], "", "a task of your own"),
        (["train.lora={rank: 2}", "model={from: /models/base}"], "", "adapters are not planned"),
        (["cluster.address=10.0.0.1:6379"], "", "the memory of a rank is not known"),
        ([GPUS], "", "the GPU 'of this run' is not known"),
        ([GPUS], "Graphics 1000", "the GPU 'Graphics 1000' is not known"),
        ([GPUS, "observe.peak_tflops=100"], "Graphics 1000", "the memory of a rank is not known"),
    ],
)
def test_where_nothing_can_be_planned_auto_is_what_is_safe(
    file: Path,
    dataset: DatasetManifest,
    overrides: list[str],
    gpu: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "_own_gpu", lambda: gpu)
    found, layout, said = decided(load_config(file, [*AUTO, *overrides]), dataset)
    assert layout == SAFE
    assert found.train.micro_batch == "auto"
    assert "auto is train.parallel.pp=1 train.zero.stage=1" in said
    assert why in said
    assert "auto is" not in decided(load_config(file, overrides), dataset)[2]
    weights = [*AUTO, *overrides, "train.zero.offload_parameters=cpu"]
    assert decided(load_config(file, weights), dataset)[1] == {**SAFE, "stage": 3, "offload": "none cpu"}


@pytest.mark.parametrize(("dp", "pp", "slots"), [("auto", "auto", 6), (2, "auto", 6), ("auto", 2, 2), (2, 2, 4)])
def test_nodes_give_slots_for_any_mesh_that_may_be_planned(file: Path, dp: object, pp: object, slots: int) -> None:
    config = load_config(file, ["cluster.nodes=3", f"train.parallel={{dp: {dp}, pp: {pp}}}"])
    nobody: Any = SimpleNamespace(is_local=True)
    pool = NodePool(config, nobody, nobody, nobody)
    assert pool._mesh_slots() == slots


def test_a_machines_memory_is_shared_by_the_ranks_of_the_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks in (1, 2):
        task = plan_task(load_config(file, [f"train.parallel.dp={ranks}"]), 400, 0)
        assert task.shared_bytes is not None
        assert 18 * GIB < task.shared_bytes < 23 * GIB  # Ray, the data workers and the system take some
        assert check_fits(task).device_limit == task.shared_bytes // ranks - task.rank_bytes
    monkeypatch.setattr(planning, "machine_bytes", lambda: 3 * GIB)
    with pytest.raises(ConfigError, match=r"its share of this machine's memory, one of 2, is 0\.\d\d GiB"):
        check_fits(plan_task(load_config(file, ["model.d_model=2048"]), 400, 0))


def test_a_refusal_names_the_memory_of_the_host(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_own_gpu", lambda: "NVIDIA H100 80GB HBM3")
    offloaded = ["model.d_model=4096", "model.num_layers=8", "train.zero={stage: 2, offload_optimizer: cpu}"]
    offloaded.append("train.checkpoint.asynchronous=false")
    config = load_config(file, ["cluster.node={slots: 2, gpus: 2}", *offloaded])
    with pytest.raises(
        ConfigError, match=r"of its host's memory, and its share .* is \d+\.\d\d GiB\. This fits, .*=none"
    ):
        check_fits(plan_task(config, 400, 0))
    assert plan_task(config, 400, 0, gpu="H100").shared_bytes is None  # those are elsewhere


def test_adapters_and_tasks_of_ones_own_are_told_and_never_refused(
    file: Path, dataset: DatasetManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "train.task=examples.ordinal_task:OrdinalClasses"
    base = make_model_folder(tmp_path / "base")
    encoder = make_model_folder(tmp_path / "encoder", family="bert", num_kv_heads=None)
    for override, told in (
        (["train.lora={rank: 2}", f"model={{from: {base}}}"], "adapters are not planned"),
        ([own], "a task of your own"),
        ([own, "model.family=bert"], "a task of your own"),
        ([own, f"model={{from: {encoder}}}"], "a task of your own"),
    ):
        config = load_config(file, override)
        assert laid(config, dataset)[0] == "auto"
        assert main(["plan", str(file), *override, "--memory-gib", "0.001"]) == 0
        assert told in capsys.readouterr().out
    assert main(["plan", str(file), "--memory-gib", "0.001"]) == 2


CGROUPS: dict[str, tuple[dict[str, Any], int | None]] = {
    "none": ({}, None),
    "version 2, own": ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "4096\n"}, 4096),
    "version 2, above": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": "2048\n",
        },
        2048,
    ),
    "version 2, of a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "512\n"}, 512),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1024\n",
        },
        1024,
    ),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_a_containers_limit_is_found(case: str, tmp_path: Path) -> None:
    files, limit = CGROUPS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="ascii")
    assert container_bytes(tmp_path) == limit
