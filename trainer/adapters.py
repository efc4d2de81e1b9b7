"""What of a model is trained when it is fine-tuned with adapters: names, shapes, and the base they belong to.

LoRA (Hu et al. 2021, section 4.1) leaves a matrix W [out, in] as it is and adds (alpha / rank) · B A to it, with A
[rank, in] and B [out, rank]. A classifier's own head is trained as a whole. What is frozen is in no checkpoint: its
folder is named by the digest of its content. No torch here.
"""

import hashlib
from dataclasses import dataclass

from data_service import storage
from data_service.errors import ConfigError
from trainer.architecture import TransformerConfig, parameter_shapes
from trainer.config import LoraConfig

__all__ = ["Base", "Lora", "base_of", "check_base", "is_whole", "trained_shapes"]

_TARGETS = {
    "q": "attention.q",
    "k": "attention.k",
    "v": "attention.v",
    "out": "attention.out",
    "gate": "feed_forward.gate",
    "up": "feed_forward.up",
    "down": "feed_forward.down",
}
_WHOLE = ("head.classifier.", "head.pooler.")
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Lora:
    """The adapters of a model."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Matrices of each block that have one, by their names in it: `attention.q`."""

    @classmethod
    def of(cls, config: LoraConfig | None, model: TransformerConfig) -> "Lora | None":
        """The adapters that `train.lora` asks for; None for none.

        Raises:
            ConfigError: the model has no such matrix.
        """
        if config is None:
            return None
        there = [name for name in _TARGETS if model.gated or name != "gate"]
        wanted = there if config.targets == "all" else config.targets
        missing = [name for name in wanted if name not in there]
        if missing:
            raise ConfigError(
                f"train.lora.targets names {', '.join(missing)}: blocks of a {model.family} model have "
                f"{', '.join(there)}. Name some of those, or `all`."
            )
        return cls(config.rank, config.alpha, tuple(_TARGETS[name] for name in there if name in wanted))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Base:
    """The weights that are frozen."""

    folder: str
    digest: str
    """BLAKE2b-128 over names and content of its `config.json` and weight files, hexadecimal."""


def is_whole(name: str) -> bool:
    """Whether a parameter of a model with adapters is trained as a whole."""
    return name.startswith(_WHOLE)


def trained_shapes(config: TransformerConfig, lora: Lora | None) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every parameter that is trained, in the order of the layers."""
    shapes = parameter_shapes(config)
    if lora is None:
        return shapes
    trained: dict[str, tuple[int, ...]] = {}
    adapted = {f"{target}.weight" for target in lora.targets}
    for name, shape in shapes.items():
        if is_whole(name):
            trained[name] = shape
        elif name.startswith("blocks.") and name.split(".", 2)[2] in adapted:
            matrix = name.removesuffix(".weight")
            trained[f"{matrix}.lora_a"] = (lora.rank, shape[1])
            trained[f"{matrix}.lora_b"] = (shape[0], lora.rank)
    return trained


def base_of(folder: str) -> Base:
    """Name a folder's weights by their content; reads all of it."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(storage.list_names(folder)):
        if name == "config.json" or name.endswith(".safetensors"):
            uri = storage.join(folder, name)
            digest.update(f"{name}\0".encode())
            offset = 0
            while data := storage.read_range(uri, offset, _READ_BYTES):
                digest.update(data)
                offset += len(data)
            digest.update(offset.to_bytes(8, "little"))
    return Base(folder, digest.hexdigest())


def check_base(base: Base, found: Base) -> None:
    """See that a folder still holds the weights that adapters were trained on.

    Args:
        base: what they were trained on.
        found: what is there now.

    Raises:
        ConfigError: it is something else.
    """
    if found.digest != base.digest:
        raise ConfigError(
            f"{found.folder} held the weights {base.digest} when its adapters were trained, and holds {found.digest} "
            "now. Restore the folder: adapters fit no other weights."
        )
