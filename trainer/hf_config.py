"""`config.json` of Hugging Face models ↔ `TransformerConfig`.

Owns what each family calls the numbers of its shape, and which of its options can be computed here. Refuses the others
(sliding windows, partial rotary positions, cross-attention, …) rather than loading a model nearly right. Reads no
files.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_service.errors import ConfigError
from trainer.architecture import Activation, Family, RopeScaling, TransformerConfig, family_traits

__all__ = ["describe", "parse"]

_FAMILIES: dict[str, Family] = {one: one for one in ("llama", "qwen2", "qwen3", "gpt2", "bert")}
_CLASSES: dict[Family, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "bert": ("BertForMaskedLM", "BertForSequenceClassification"),
}
"""Names in `transformers` of the language model and of the classifier."""
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_DEFAULT_LABELS = 2
"""Classes of a classifier whose `config.json` names none; `transformers` leaves two of them out."""
_YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def parse(uri: str, found: Any) -> TransformerConfig:
    """The shape that a `config.json` describes.

    Args:
        uri: of the file, for messages.
        found: its content.

    Raises:
        ConfigError: a key is missing or garbled, or the model cannot be computed here.
    """
    kind = found.get("model_type") if isinstance(found, dict) else type(found).__name__
    if kind not in _FAMILIES:
        raise ConfigError(f"{uri}: model_type is {kind!r}. Choose a model of one of {', '.join(_FAMILIES)}.")
    family = _FAMILIES[kind]
    try:
        if family == "gpt2":
            config = _parse_gpt2(uri, found)
        elif family == "bert":
            config = _parse_bert(uri, found)
        else:
            config = _parse_llama_like(uri, found, family)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"{uri} lacks or garbles a key of a {family} model: {error!r}. Fetch the folder again."
        ) from error
    impossible = next(_impossible(config), None)
    if impossible is not None:
        raise ConfigError(f"{uri} describes a {family} model with {impossible}. Fetch the folder again.")
    return config


def _impossible(config: TransformerConfig) -> Iterator[str]:
    """Numbers that no model has."""
    sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_positions")
    for name in sizes:
        if getattr(config, name) < 1:
            yield f"{name} {getattr(config, name)}"
    for name in ("num_labels", "token_types", "norm_eps", "init_std"):
        if not 0 <= getattr(config, name) < math.inf:
            yield f"{name} {getattr(config, name)}"
    if config.num_heads % config.num_kv_heads:
        yield f"{config.num_heads} heads that share {config.num_kv_heads} keys and values"
    if config.positions == "learned":
        return
    if config.head_dim % 2:
        yield f"head_dim {config.head_dim}, of which no pairs can be rotated"
    if not 1 < config.rope_theta < math.inf:
        yield f"rope_theta {config.rope_theta}"
    scaling = config.rope_scaling
    if scaling is None:
        return
    numbers = ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor", *_YARN_KEYS)
    for name in numbers:
        value = getattr(scaling, name)
        may_be_zero = name.startswith("mscale")  # leaves `attention_factor` to be derived from `factor`
        if value is not None and not (0 < value < math.inf or (may_be_zero and value == 0)):
            yield f"{name} {value} of its rope_scaling"
    if scaling.kind == "llama3" and scaling.low_freq_factor == scaling.high_freq_factor:
        yield f"low_freq_factor and high_freq_factor {scaling.low_freq_factor} of its rope_scaling"


def describe(
    config: TransformerConfig, special: Mapping[str, int], dtype: str, class_names: Sequence[str] | None
) -> dict[str, Any]:
    """What `config.json` says of a model.

    Args:
        config: its shape.
        special: ids of special tokens by `transformers`' names of them.
        dtype: of the weights, `float32` or `bfloat16`.
        class_names: of a classifier, in the order of its outputs; None numbers them.
    """
    own = {"gpt2": _describe_gpt2, "bert": _describe_bert}.get(config.family, _describe_llama_like)(config)
    classes: dict[str, Any] = {}
    if config.num_labels:
        names = class_names or [f"LABEL_{number}" for number in range(config.num_labels)]
        assert len(names) == config.num_labels, (names, config.num_labels)
        classes = {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
    return {
        "architectures": [_CLASSES[config.family][config.num_labels > 0]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        **own,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
        **classes,
        **special,
    }


def _head(found: Mapping[str, Any], tied_by_default: bool) -> dict[str, Any]:
    """The fields that say what the model ends with."""
    classifies = any("ForSequenceClassification" in name for name in found.get("architectures") or ())
    names = found.get("id2label")
    num_labels = (len(names) if names else int(found.get("num_labels", _DEFAULT_LABELS))) if classifies else 0
    tied = bool(found.get("tie_word_embeddings", tied_by_default))
    return {"num_labels": num_labels, "tie_embeddings": tied and not classifies}


def _activation(uri: str, key: str, name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{uri}: {key} is {name!r}; supported are {', '.join(_ACTIVATIONS)}. Choose another model.")
    return _ACTIVATIONS[name]


def _refuse_unless_plain(uri: str, found: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Raise where a key that may be absent has another value than the one that is computed here."""
    for key, value in plain.items():
        if found.get(key, value) != value:
            raise ConfigError(f"{uri}: {key} is {found[key]!r}; only {value!r} is supported. Choose another model.")


def _parse_llama_like(uri: str, found: dict[str, Any], family: Family) -> TransformerConfig:
    _refuse_unless_plain(uri, found, {"rope_interleaved": False})
    _refuse_windows(uri, found)
    max_positions = int(found["max_position_embeddings"])
    theta, scaling = _parse_rope(uri, found, max_positions)
    biased = bool(found.get("attention_bias", False))
    return TransformerConfig(
        vocab_size=int(found["vocab_size"]),
        d_model=int(found["hidden_size"]),
        num_layers=int(found["num_hidden_layers"]),
        num_heads=int(found["num_attention_heads"]),
        num_kv_heads=int(found.get("num_key_value_heads") or found["num_attention_heads"]),
        head_dim=int(
            found.get("head_dim")
            or (128 if family == "qwen3" else found["hidden_size"] // found["num_attention_heads"])
        ),
        d_ff=int(found["intermediate_size"]),
        rope_theta=theta,
        norm_eps=float(found.get("rms_norm_eps", 1e-6)),
        init_std=float(found.get("initializer_range", 0.02)),
        max_positions=max_positions,
        family=family,
        rope_scaling=scaling,
        activation=_activation(uri, "hidden_act", found.get("hidden_act", "silu")),
        qkv_bias=family == "qwen2" or biased,
        out_bias=family != "qwen2" and biased,
        mlp_bias=family == "llama" and bool(found.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        **_head(found, tied_by_default=False),
    )


def _refuse_windows(uri: str, found: Mapping[str, Any]) -> None:
    """Qwen's sliding windows: layers that do not see the whole row."""
    if not found.get("use_sliding_window", False):
        return
    sliding = "sliding_attention" in (found.get("layer_types") or ["sliding_attention"])
    window = found.get("sliding_window")
    if sliding and window is not None and int(window) < int(found["max_position_embeddings"]):
        raise ConfigError(f"{uri}: use_sliding_window is True; windows are not supported. Choose another model.")


def _parse_rope(uri: str, found: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies; keys are those of `transformers` before 5 or from 5 on."""
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
    fallback = (found.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    theta = float(rope.get("rope_theta", found.get("rope_theta", fallback)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    _refuse_unless_plain(uri, {**found, **rope}, {"partial_rotary_factor": 1.0})
    if kind == "default":
        return theta, None
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise ConfigError(
            f"{uri}: rope_type (rope_scaling) is {kind!r}; supported are default, linear, dynamic, llama3 and yarn. "
            "Choose another model."
        )
    original = None
    if kind in ("llama3", "yarn"):
        named = found.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        original = int(named or max_positions)
    factor = rope.get("factor")
    if factor is None and kind == "yarn" and original is not None:
        factor = max_positions / original
    scaling = RopeScaling(kind, float(rope["factor"] if factor is None else factor), original)
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return theta, RopeScaling(kind, scaling.factor, original, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        own = {key: None if rope.get(key) is None else float(rope[key]) for key in _YARN_KEYS}
        return theta, RopeScaling(kind, scaling.factor, original, truncate=bool(rope.get("truncate", True)), **own)
    return theta, scaling


def _parse_gpt2(uri: str, found: dict[str, Any]) -> TransformerConfig:
    plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    _refuse_unless_plain(uri, found, plain)
    width, heads = int(found["n_embd"]), int(found["n_head"])
    traits = family_traits("gpt2") | {
        "activation": _activation(uri, "activation_function", found.get("activation_function", "gelu_new"))
    }
    return TransformerConfig(
        vocab_size=int(found["vocab_size"]),
        d_model=width,
        num_layers=int(found["n_layer"]),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=int(found.get("n_inner") or 4 * width),
        rope_theta=10000.0,
        norm_eps=float(found.get("layer_norm_epsilon", 1e-5)),
        init_std=float(found.get("initializer_range", 0.02)),
        max_positions=int(found["n_positions"]),
        **_head(found, tied_by_default=True),
        **traits,
    )


def _parse_bert(uri: str, found: dict[str, Any]) -> TransformerConfig:
    plain = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
    _refuse_unless_plain(uri, found, plain)
    width, heads = int(found["hidden_size"]), int(found["num_attention_heads"])
    traits = family_traits("bert") | {
        "activation": _activation(uri, "hidden_act", found.get("hidden_act", "gelu")),
        "token_types": int(found.get("type_vocab_size", 2)),
    }
    return TransformerConfig(
        vocab_size=int(found["vocab_size"]),
        d_model=width,
        num_layers=int(found["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=int(found["intermediate_size"]),
        rope_theta=10000.0,
        norm_eps=float(found.get("layer_norm_eps", 1e-12)),
        init_std=float(found.get("initializer_range", 0.02)),
        max_positions=int(found["max_position_embeddings"]),
        **_head(found, tied_by_default=True),
        **traits,
    )


def _named(activation: Activation) -> str:
    return {"gelu_tanh": "gelu_new"}.get(activation, activation)


def _describe_llama_like(config: TransformerConfig) -> dict[str, Any]:
    """Keys of Llama and Qwen; rotary positions twice, for `transformers` before and from version 5."""
    rope = _describe_rope(config)
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    described = {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _named(config.activation),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
    }
    if config.rope_scaling is not None:
        described["rope_scaling"] = scaled
    if config.family == "qwen2":
        return described | {"use_sliding_window": False}
    assert config.qkv_bias == config.out_bias, "Llama and Qwen3 have biases on all four projections, or on none"
    described["attention_bias"] = config.qkv_bias
    return described | ({"mlp_bias": config.mlp_bias} if config.family == "llama" else {"use_sliding_window": False})


def _describe_rope(config: TransformerConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": config.rope_theta, "factor": scaling.factor}
    if scaling.original_max_positions is not None:
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    keys = ("low_freq_factor", "high_freq_factor", *_YARN_KEYS)
    rope |= {key: getattr(scaling, key) for key in keys if getattr(scaling, key) is not None}
    return rope | ({} if scaling.truncate else {"truncate": False})


def _describe_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "activation_function": _named(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _describe_bert(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": _named(config.activation),
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
