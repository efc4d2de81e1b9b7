"""Hugging Face folders, in and out.

Owns the translation between our Llama-style model and the folder that `transformers` loads: `config.json`, weights in
safetensors and a tokenizer. Weights are streamed, one tensor in memory at a time. Refuses what our model cannot compute
(other architectures, biases, scaled rotary positions) rather than loading it nearly right; never unpickles. Does not
import `transformers`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from data_service import storage
from data_service.errors import ConfigError
from trainer.errors import CheckpointCorruptError
from trainer.model import Transformer, TransformerConfig, parameter_shapes
from trainer.safetensors_io import MAX_HEADER_BYTES, PREFIX_BYTES, TensorEntry, make_header, parse_header

__all__ = ["FolderWeights", "build_from_hf", "hf_name", "load_hf", "open_weights", "read_config", "save_hf"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}


def hf_name(name: str) -> str:
    """The name that `transformers` gives the parameter with a canonical name."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    matched = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    assert matched is not None, name
    return f"model.layers.{matched[1]}.{_BLOCK_NAMES[matched[2]]}.weight"


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
    _refuse_unsupported(uri, found)
    rope = found.get("rope_parameters") or {}
    try:
        return TransformerConfig(
            vocab_size=int(found["vocab_size"]),
            d_model=int(found["hidden_size"]),
            num_layers=int(found["num_hidden_layers"]),
            num_heads=int(found["num_attention_heads"]),
            num_kv_heads=int(found.get("num_key_value_heads") or found["num_attention_heads"]),
            head_dim=int(found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]),
            d_ff=int(found["intermediate_size"]),
            rope_theta=float(rope.get("rope_theta", found.get("rope_theta", 10000.0))),
            norm_eps=float(found.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(found.get("tie_word_embeddings", False)),
            init_std=float(found.get("initializer_range", 0.02)),
            max_positions=int(found["max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{uri} lacks or garbles a key of a llama model: {error!r}. Fetch the folder again."
        ) from error


def save_hf(
    folder: str,
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_folder: str | None,
    dtype: Literal["F32", "BF16"] = "F32",
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    `config.json` is written last: a folder without it was not finished.

    Args:
        folder: path or URI of the folder to write.
        config: shape of the model.
        tensors: (canonical name, values) in the order of `trainer.model.parameter_shapes`, each once.
        tokenizer_folder: path or URI of the tokenizer's files to copy; None leaves the folder without one.
        dtype: of the written weights.

    Raises:
        ConfigError: the tokenizer's folder lacks `tokenizer.json`.
    """
    shapes = parameter_shapes(config)
    header, _ = make_header([(hf_name(name), dtype, shape) for name, shape in shapes.items()], {"format": "pt"})
    with storage.publish(storage.join(folder, _WEIGHTS)) as file:
        file.write(header)
        written = []
        for name, tensor in tensors:
            assert tuple(tensor.shape) == shapes[name], (name, tensor.shape)
            written.append(name)
            file.write(_to_bytes(tensor, _DTYPES[dtype]))
        assert written == list(shapes), "each parameter once, in the order of parameter_shapes"
    special: dict[str, int] = {}
    if tokenizer_folder is not None:
        special = _copy_tokenizer(tokenizer_folder, folder)
        generation = json.dumps(special, indent=2).encode()
        storage.write_bytes(storage.join(folder, "generation_config.json"), generation)
    described = json.dumps(_describe(config, special, dtype), indent=2).encode()
    storage.write_bytes(storage.join(folder, _CONFIG), described)


class FolderWeights(Mapping[str, Tensor]):
    """Weights of a Hugging Face folder by canonical name, each read when it is asked for."""

    def __init__(self, folder: str, config: TransformerConfig) -> None:
        """Find every parameter of `config` in the folder's headers.

        Raises:
            ConfigError: weights are missing, of another shape or dtype, or have no place in the model.
        """
        self._folder = folder
        self._entries: dict[str, tuple[str, TensorEntry]] = {}
        found = {
            name: (uri, entry)
            for uri in _weight_files(folder)
            for name, entry in _read_header(uri).items()
            if not name.endswith(".rotary_emb.inv_freq")  # derived; old exports hold it
        }
        if config.tie_embeddings:
            found.pop("lm_head.weight", None)
        for name, shape in parameter_shapes(config).items():
            uri_and_entry = found.pop(hf_name(name), None)
            if uri_and_entry is None:
                raise ConfigError(f"{folder} holds no {hf_name(name)}, which its {_CONFIG} calls for. Fetch it again.")
            entry = uri_and_entry[1]
            if entry.shape != shape or entry.dtype not in _DTYPES:
                raise ConfigError(
                    f"{folder}: {entry.name} is {entry.dtype} of shape {entry.shape}; its {_CONFIG} calls for "
                    f"{shape}, in one of {', '.join(_DTYPES)}. Fetch it again."
                )
            self._entries[name] = uri_and_entry
        if found:
            raise ConfigError(
                f"{folder} holds {', '.join(sorted(found)[:3])}{' …' if len(found) > 3 else ''}, which a llama model "
                "has no place for. Use a model without biases, adapters or extra layers."
            )

    def __getitem__(self, name: str) -> Tensor:
        """Read one parameter in the dtype it is stored in.

        Raises:
            CheckpointCorruptError: the file is shorter than its header says.
        """
        uri, entry = self._entries[name]
        data = bytearray(storage.read_range(uri, entry.offset, entry.num_bytes))
        if len(data) != entry.num_bytes:
            raise CheckpointCorruptError(f"{uri} ends inside of {entry.name}. Fetch or export it again.")
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        """Canonical names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """How many parameters there are."""
        return len(self._entries)


def open_weights(folder: str, config: TransformerConfig) -> FolderWeights:
    """The weights of a folder, for a model of the given shape; see `FolderWeights`."""
    return FolderWeights(folder, config)


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


def _refuse_unsupported(uri: str, found: Any) -> None:
    """Raise ConfigError for what our model would compute differently."""
    if not isinstance(found, dict) or found.get("model_type") != "llama":
        kind = found.get("model_type") if isinstance(found, dict) else type(found).__name__
        raise ConfigError(f"{uri}: model_type is {kind!r}; only 'llama' is supported. Choose a llama model.")
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for key, value, plain in (
        ("hidden_act", found.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(found.get("attention_bias", False)), False),
        ("mlp_bias", bool(found.get("mlp_bias", False)), False),
        ("rope_type (rope_scaling)", rope_type, "default"),
        ("rope_interleaved", bool(found.get("rope_interleaved", False)), False),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0)), 1.0),
    ):
        if value != plain:
            raise ConfigError(f"{uri}: {key} is {value!r}; only {plain!r} is supported. Choose another model.")


def _describe(config: TransformerConfig, special: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """What `config.json` says; `rope_theta` twice, for `transformers` before and from version 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype],
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype],
        **special,
    }


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


def _read_header(uri: str) -> dict[str, TensorEntry]:
    prefix = int.from_bytes(storage.read_range(uri, 0, PREFIX_BYTES), "little")
    if prefix > MAX_HEADER_BYTES:
        raise ConfigError(f"{uri} claims a header of {prefix} bytes: it is no safetensors file. Fetch it again.")
    return parse_header(storage.read_range(uri, PREFIX_BYTES, prefix), uri)


def _to_bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """Row-major little-endian bytes of a tensor, cast."""
    flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
