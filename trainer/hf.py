"""Hugging Face folders, in and out.

Owns the files of a folder that `transformers` loads: `config.json`, weights in safetensors and a tokenizer. Weights are
streamed, one tensor in memory at a time. What families call their numbers and tensors is in `trainer.hf_config` and
`trainer.hf_tensors`. Never unpickles; does not import `transformers`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from data_service import storage
from data_service.errors import ConfigError
from trainer.architecture import TransformerConfig, parameter_shapes
from trainer.hf_config import describe, parse
from trainer.hf_tensors import (
    Place,
    bare_name,
    is_ignored,
    place_of,
    stored_shape,
    stored_tensors,
    take,
    written_shapes,
)
from trainer.model import Transformer
from trainer.safetensors_io import MAX_HEADER_BYTES, PREFIX_BYTES, TensorEntry, make_header, parse_header

__all__ = ["FolderWeights", "build_from_hf", "load_hf", "open_weights", "read_config", "save_hf"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_NAMES = {"F32": "float32", "BF16": "bfloat16"}
_HEADS = ("head.classifier.", "head.pooler.")
"""Parameters that a folder of a language model lacks when a classifier starts from it."""
_DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}


def read_config(folder: str) -> TransformerConfig:
    """The shape of a folder's model.

    Args:
        folder: path or URI.

    Raises:
        ConfigError: there is no `config.json`, or it describes a model that cannot be computed here.
    """
    uri = storage.join(folder, _CONFIG)
    try:
        found = json.loads(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise ConfigError(f"model.from={folder}: there is no {_CONFIG}. Name a Hugging Face model folder.") from error
    except ValueError as error:
        raise ConfigError(f"{uri} is no JSON: {error}. Fetch the folder again.") from error
    return parse(uri, found)


def save_hf(
    folder: str,
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_folder: str | None,
    dtype: Literal["F32", "BF16"] = "F32",
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a folder that `transformers`' auto classes load: AutoModelForCausalLM, …ForMaskedLM or …ForSequence….

    `config.json` is written last: a folder without it was not finished.

    Args:
        folder: path or URI of the folder to write.
        config: shape of the model.
        tensors: (canonical name, values) in the order of `trainer.model.parameter_shapes`, each once.
        tokenizer_folder: path or URI of the tokenizer's files to copy; None leaves the folder without one.
        dtype: of the written weights.
        class_names: of a classifier, in the order of its outputs; None numbers them.

    Raises:
        ConfigError: the tokenizer's folder lacks `tokenizer.json`.
    """
    header, _ = make_header([(name, dtype, shape) for name, shape in written_shapes(config)], {"format": "pt"})
    with storage.publish(storage.join(folder, _WEIGHTS)) as file:
        file.write(header)
        for _, tensor in stored_tensors(tensors, config):
            file.write(_to_bytes(tensor, _DTYPES[dtype]))
    special: dict[str, int] = {}
    if tokenizer_folder is not None:
        special = _copy_tokenizer(tokenizer_folder, folder)
        generation = json.dumps(special, indent=2).encode()
        storage.write_bytes(storage.join(folder, "generation_config.json"), generation)
    described = json.dumps(describe(config, special, _NAMES[dtype], class_names), indent=2).encode()
    storage.write_bytes(storage.join(folder, _CONFIG), described)


class FolderWeights(Mapping[str, Tensor]):
    """Weights of a Hugging Face folder by canonical name, each read when it is asked for."""

    def __init__(self, folder: str, config: TransformerConfig, fresh_head: bool = False) -> None:
        """Find every parameter of `config` in the folder's headers.

        Args:
            folder: path or URI.
            config: shape of the model.
            fresh_head: a classifier's own parameters may lack, or have another number of classes; they are then not
                among the names.

        Raises:
            ConfigError: weights are missing, of another shape or dtype, or have no place in the model; or a file is
                missing or damaged.
        """
        self._entries: dict[str, tuple[str, TensorEntry, Place]] = {}
        found = {bare_name(name): (uri, entry) for uri in _weight_files(folder) for name, entry in _read_header(uri)}
        used = set()
        for name, shape in parameter_shapes(config).items():
            place = place_of(name, config)
            bare = bare_name(place.name)
            may_lack = fresh_head and name.startswith(_HEADS)
            if bare not in found:
                if may_lack:
                    continue
                raise ConfigError(f"{folder} holds no {place.name}, which its {_CONFIG} calls for. Fetch it again.")
            uri, entry = found[bare]
            expected = stored_shape(place, shape)
            if entry.shape != expected or entry.dtype not in _DTYPES:
                if may_lack:
                    continue
                raise ConfigError(
                    f"{folder}: {entry.name} is {entry.dtype} of shape {entry.shape}; its {_CONFIG} calls for "
                    f"{expected}, in one of {', '.join(_DTYPES)}. Fetch it again."
                )
            used.add(bare)
            self._entries[name] = (uri, entry, place)
        left = sorted(found[bare][1].name for bare in found.keys() - used if not is_ignored(bare))
        if left:
            raise ConfigError(
                f"{folder} holds {', '.join(left[:3])}{' …' if len(left) > 3 else ''}, which its {_CONFIG} has no "
                f"place for in a {config.family} model. Use one without adapters or extra layers."
            )

    def __getitem__(self, name: str) -> Tensor:
        """Read one parameter in the dtype it is stored in.

        Raises:
            ConfigError: the file is shorter than its header says.
        """
        uri, entry, place = self._entries[name]
        data = bytearray(storage.read_range(uri, entry.offset, entry.num_bytes))
        if len(data) != entry.num_bytes:
            raise ConfigError(f"{uri} ends inside of {entry.name}. Fetch or export the folder again.")
        return take(torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape), place)

    def __iter__(self) -> Iterator[str]:
        """Canonical names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """How many parameters there are."""
        return len(self._entries)


def open_weights(folder: str, config: TransformerConfig) -> FolderWeights:
    """The weights of a folder to start a model of the given shape from; a classifier's own may lack."""
    return FolderWeights(folder, config, fresh_head=config.num_labels > 0)


def load_hf(folder: str) -> tuple[TransformerConfig, FolderWeights]:
    """Shape and weights of a folder; raises ConfigError as `read_config` and `FolderWeights` do."""
    config = read_config(folder)
    return config, FolderWeights(folder, config)


def build_from_hf(folder: str, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """A model with the folder's weights.

    Args:
        folder: path or URI.
        device: where the weights go.
        dtype: that they are cast to.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ConfigError: the folder cannot be loaded.
    """
    config, weights = load_hf(folder)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval().requires_grad_(False)


def _copy_tokenizer(source: str, folder: str) -> dict[str, int]:
    """Copy a tokenizer's files; returns the ids of its special tokens as `config.json` names them."""
    texts: dict[str, bytes] = {}
    for name in _TOKENIZER_FILES:
        try:
            texts[name] = storage.read_bytes(storage.join(source, name))
        except FileNotFoundError:
            continue
    if "tokenizer.json" not in texts:
        raise ConfigError(f"{source} holds no tokenizer.json. Name the dataset's tokenizer/ folder.")
    for name, text in texts.items():
        storage.write_bytes(storage.join(folder, name), text)
    ids = {token["content"]: int(token["id"]) for token in json.loads(texts["tokenizer.json"])["added_tokens"]}
    named = json.loads(texts.get("tokenizer_config.json", b"{}"))
    special: dict[str, int] = {}
    for role in ("bos", "eos", "pad"):
        token = named.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            special[f"{role}_token_id"] = ids[content]
    return special


def _weight_files(folder: str) -> list[str]:
    """URIs of the folder's safetensors files."""
    try:
        index = json.loads(storage.read_bytes(storage.join(folder, _INDEX)))
        names = sorted({str(name) for name in index["weight_map"].values()})
    except FileNotFoundError:
        names = []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: {_INDEX} does not name its files: {error!r}. Fetch the folder again.") from error
    if any("/" in name for name in names):
        raise ConfigError(f"{folder}: {_INDEX} names files outside of the folder. Do not use it.")
    if names:
        return [storage.join(folder, name) for name in names]
    uri = storage.join(folder, _WEIGHTS)
    if not storage.exists(uri):
        raise ConfigError(
            f"{folder} holds neither {_WEIGHTS} nor {_INDEX}; pickled weights are not read. "
            "Save the model with safe_serialization=True."
        )
    return [uri]


def _read_header(uri: str) -> Iterable[tuple[str, TensorEntry]]:
    try:
        prefix = int.from_bytes(storage.read_range(uri, 0, PREFIX_BYTES), "little")
    except FileNotFoundError as error:
        raise ConfigError(f"{uri} is not there, and {_INDEX} beside it names it. Fetch the folder again.") from error
    if prefix > MAX_HEADER_BYTES:
        raise ConfigError(f"{uri} claims a header of {prefix} bytes: it is no safetensors file. Fetch it again.")
    return parse_header(storage.read_range(uri, PREFIX_BYTES, prefix), uri).items()


def _to_bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """Row-major little-endian bytes of a tensor, cast."""
    flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
