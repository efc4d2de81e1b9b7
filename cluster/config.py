"""`RunConfig`: the one file that describes a run, read, overridden and cross-checked.

Owns parsing (YAML, dotted overrides), the messages for what is wrong with it, and the checks that concern more than
one section. Nothing here touches a cluster: the checks need the file alone.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from cluster.config_errors import describe
from cluster.sections import ClusterConfig, K8sConfig, RunSection
from cluster.yaml_source import YamlSource
from data_service.config import DataConfig
from data_service.errors import ConfigError
from data_service.settings import Section
from serve.config import ServeConfig
from trainer.config import RUN_REFERENCE, AutoTrainConfig, ModelConfig, TrainConfig
from trainer.observe.config import ObserveConfig

__all__ = ["LaidOutConfig", "RunConfig", "dump_yaml", "load_config"]


class RunConfig(Section):
    """A whole run."""

    run: RunSection
    """Identity and storage."""
    cluster: ClusterConfig = ClusterConfig()
    """Machines."""
    data: DataConfig
    """What is trained on."""
    model: ModelConfig = ModelConfig()
    """The Transformer."""
    train: AutoTrainConfig = AutoTrainConfig()
    """How it is trained."""
    observe: ObserveConfig = ObserveConfig()
    """How the run is watched."""
    serve: ServeConfig = ServeConfig()
    """The endpoint."""
    k8s: K8sConfig = K8sConfig()
    """Rendering for KubeRay."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        pp, dp, slots = self.train.parallel.safe_pp, self.train.parallel.dp, self.cluster.total_slots
        if self.model.from_ is None and pp > self.model.num_layers:
            raise ValueError(
                f"train.parallel.pp={pp} with model.num_layers={self.model.num_layers}: a stage needs a layer. "
                f"Set train.parallel.pp to {self.model.num_layers} or less, or add layers."
            )
        wanted = pp * (1 if dp == "auto" else dp)
        if wanted > slots:
            raise ValueError(
                f"train.parallel.dp={dp} with train.parallel.pp={self.train.parallel.pp} needs {wanted} slots, and "
                f"cluster.nodes={self.cluster.nodes} with cluster.node.slots={self.cluster.node.slots} gives {slots}. "
                "Add nodes or slots, or lower the mesh."
            )
        if self.cluster.elastic and self.cluster.min_nodes * self.cluster.node.slots < pp:
            raise ValueError(
                f"cluster.min_nodes={self.cluster.min_nodes} with cluster.node.slots={self.cluster.node.slots} cannot "
                f"hold one pipeline of train.parallel.pp={pp}. Raise cluster.min_nodes or lower train.parallel.pp."
            )
        if self.train.device == "cpu" and self.cluster.node.gpus:
            raise ValueError(
                f"train.device=cpu with cluster.node.gpus={self.cluster.node.gpus}: ranks on CPUs need no GPU. Set "
                "cluster.node.gpus=0, or train.device=auto."
            )
        if self.train.device == "cuda" and self.cluster.node.gpus == 0:
            raise ValueError(
                "train.device=cuda with cluster.node.gpus=0: no slot has a GPU. Set cluster.node.gpus to the slots of "
                "a node, or train.device=auto."
            )
        self._check_task()
        stalled_s, collective_s = self.data.service.stalled_s, self.train.collective_timeout_s
        if stalled_s >= collective_s:
            raise ValueError(
                f"data.service.stalled_s={stalled_s:g} with train.collective_timeout_s={collective_s:g}: ranks that "
                "wait for a peer without data would give up before it says so. Set data.service.stalled_s below it."
            )
        if self.serve.kv_cache_tokens < self.data.seq_len:
            raise ValueError(
                f"serve.kv_cache_tokens={self.serve.kv_cache_tokens} is below data.seq_len={self.data.seq_len}: not "
                "one full sequence fits. Raise serve.kv_cache_tokens."
            )
        return self

    def _check_task(self) -> None:
        """Raise ValueError where the data or the model are none for the task."""
        task, sources = self.train.task, self.data.sources
        if task == "sft" and not any(source.messages is not None for source in sources):
            raise ValueError(
                "train.task=sft: no source holds chats. Name their column with data.sources.N.messages, or set "
                "train.task=causal_lm."
            )
        if task == "text_classification" and (
            self.data.rows != "document" or not any(source.label is not None for source in sources)
        ):
            raise ValueError(
                f"train.task=text_classification with data.rows={self.data.rows}: rows must be texts with classes. Set "
                "data.rows=document, and the column of the classes with data.sources.N.label."
            )
        if task in ("causal_lm", "sft") and self.model.from_ is None and self.model.family == "bert":
            raise ValueError(
                f"train.task={task} with model.family=bert: an encoder sees the tokens it would have to predict. Set "
                "train.task=text_classification, or another family."
            )
        if self.train.lora is not None and self.model.from_ is None:
            raise ValueError(
                "train.lora without model.from: adapters are trained on weights that are there. Set model.from."
            )

    @property
    def root(self) -> str:
        """The run's folder: STORAGE/NAME."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"

    @property
    def dataset_uri(self) -> str:
        """Folder of the prepared dataset."""
        return self.data.dataset or f"{self.root}/dataset"

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, ready for YAML or JSON."""
        return self.model_dump(mode="json", by_alias=True)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run it resumes.

        Of the data only what holds from the first row to the last. Weights and skipped batches may change behind what
        was consumed: the newest checkpoint's cursor decides (`cluster.run_data`). Sources and tokenizer are compared by
        the dataset itself.
        """
        full = self.resolved()
        data = {key: full["data"][key] for key in ("rows", "seq_len", "shuffle_window_shards", "isolate_documents")}
        return {
            "run.seed": full["run"]["seed"],
            **{f"data.{key}": value for key, value in data.items()},
            **{f"model.{key}": value for key, value in full["model"].items()},
            "train.task": full["train"]["task"],
            "train.lora": full["train"]["lora"],
            "train.global_batch": full["train"]["global_batch"],
            "train.optimizer.name": full["train"]["optimizer"]["name"],
        }

    def digest(self) -> str:
        """Hex digest (blake2b, 64 bits) of the resolved configuration."""
        text = json.dumps(self.resolved(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class LaidOutConfig(RunConfig):
    """A run whose layout is decided: what trains takes this one, so that no `auto` of the layout can reach a rank."""

    train: TrainConfig = TrainConfig()
    """How it is trained."""

    @classmethod
    def of(cls, config: RunConfig, keys: Mapping[str, int | str]) -> Self:
        """The run with these dotted keys, checked anew as a whole.

        Raises:
            ConfigError: together they are no run; or a key of the layout is `auto` still.
        """
        tree = config.model_dump(by_alias=True)
        for dotted, value in keys.items():
            *sections, name = dotted.split(".")
            holder = tree
            for section in sections:
                holder = holder[section]
            holder[name] = value
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            asked = " ".join(f"{key}={value}" for key, value in keys.items()) or "as the file has it"
            found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
            raise ConfigError(f"the layout {asked} is none that this run can have: {found}. Write it out.") from error


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML file, apply `dotted.key=value` overrides, resolve relative paths and check everything.

    Raises:
        ConfigError: the file cannot be read or parsed, an override is malformed, a key is unknown, a value is wrong,
            or two sections disagree; the message names file, line, key and fix.
    """
    source = YamlSource.read(Path(path))
    for override in overrides:
        source.override(override)
    _resolve_paths(source.tree, source.folder)
    try:
        return RunConfig.model_validate(source.tree)
    except ValidationError as error:
        raise ConfigError(describe(error, RunConfig, source)) from None


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make the paths of the file absolute: they are relative to the file, not to where the command runs."""
    data = tree.get("data")
    places: list[tuple[Any, str]] = [
        (tree.get("run"), "storage"),
        (tree.get("model"), "from"),
        (data, "dataset"),
        (data, "chat_template"),
    ]
    if isinstance(tree.get("run"), dict):
        tree["run"].setdefault("storage", "./runs")
    if isinstance(data, dict):
        places.append((data.get("tokenizer"), "path"))
        places.append((data.get("service"), "cache_dir"))
        if isinstance(data.get("sources"), list):
            places.extend((item, "path") for item in data["sources"])
        _resolve_tokenizer(data.get("tokenizer"), tree.get("run"))
    for holder, key in places:
        if isinstance(holder, dict) and isinstance(holder.get(key), str) and "://" not in holder[key]:
            holder[key] = str((folder / Path(holder[key]).expanduser()).resolve())


def _resolve_tokenizer(tokenizer: Any, run: Any) -> None:
    """`run://NAME` is the tokenizer of a run below the same storage; a run has one, whichever step is named."""
    path = tokenizer.get("path") if isinstance(tokenizer, dict) else None
    if isinstance(path, str) and path.startswith("run://") and isinstance(run, dict):
        matched = re.fullmatch(RUN_REFERENCE, path)
        if matched is None:
            raise ConfigError(f"data.tokenizer.path={path!r} names no run. Write run://NAME.")
        tokenizer["path"] = f"{str(run['storage']).rstrip('/')}/{matched['run']}/dataset/tokenizer"


def dump_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True)
