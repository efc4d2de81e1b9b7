"""Text from a model folder in this process: no Ray, no HTTP.

Owns the one-prompt path that `stormjib generate` uses; it runs the same engine as the endpoint.
"""

from collections.abc import Iterator
from typing import Literal

from data_service.errors import ConfigError
from serve.config import ServeConfig
from serve.engine.messages import EngineRequest
from serve.engine.sequence import SamplingParams
from serve.model_folder import read_model_folder
from serve.weights import build_engine

__all__ = ["stream_text"]


def stream_text(
    model_uri: str,
    prompt: str,
    max_tokens: int,
    temperature: float = 1.0,
    *,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int = 1,
) -> Iterator[str]:
    """Complete a prompt; yields pieces that concatenate to the whole completion, never half a character.

    Args:
        model_uri: a Hugging Face folder.
        prompt: may be empty: the model then begins a document.
        max_tokens: new tokens, at most; fewer where the context ends before.
        temperature: 0 takes the most likely token each time.
        top_p: keep the most likely tokens that together reach this probability.
        top_k: keep this many most likely tokens.
        seed: makes sampling repeatable.
        stop: texts that end the completion.
        dtype: of weights and cache.
        device: where to compute.
        threads: CPU threads.

    Raises:
        ConfigError: the folder cannot be served, or the prompt leaves no room.
        EngineFailedError: the model gave logits that are not finite.
    """
    folder = read_model_folder(model_uri)
    ids = folder.encode(prompt)
    room = folder.max_positions - len(ids)
    if not ids or room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens and the model's context {folder.max_positions}. "
            "Give a prompt of at least one token that leaves room for an answer."
        )
    params = SamplingParams(min(max_tokens, room), temperature, top_p, top_k, seed=seed, stop=stop)
    config = ServeConfig(
        dtype=dtype,
        cpus_per_replica=threads,
        gpus_per_replica=float(device == "cuda"),
        max_num_seqs=1,
        kv_cache_tokens=max(64, len(ids) + params.max_tokens),
    )
    core, _ = build_engine(model_uri, config, device)
    core.add(EngineRequest("local", (tuple(ids),), 1, params))
    while core.has_work:
        for _, delta in core.step():
            if delta.error is not None:
                raise delta.error
            if delta.text:
                yield delta.text
