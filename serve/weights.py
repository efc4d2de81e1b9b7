"""From a Hugging Face folder to an engine that computes.

Owns the choice of dtype and the size of the cache. Imports torch, never deepspeed.
"""

import math
from typing import Literal

import torch

from data_service.errors import ConfigError
from serve.config import ServeConfig
from serve.engine.core import EngineCore
from serve.engine.detokenizer import Vocabulary
from serve.engine.kv_blocks import BlockPool
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.model_folder import ModelFolder, read_model_folder
from trainer.hf import build_from_hf

__all__ = ["PASS_TOKENS", "build_engine"]

PASS_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens of one pass: a longer prompt enters in chunks, so that running streams do not wait for all of it."""


def build_engine(model_uri: str, config: ServeConfig, device: Literal["cpu", "cuda"]) -> tuple[EngineCore, ModelFolder]:
    """Load the weights and join the parts of an engine.

    Sets torch's thread count for the process on a CPU.

    Raises:
        ConfigError: the folder cannot be served, or the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("serve.gpus_per_replica asks for a GPU, but torch finds none. Set serve.gpus_per_replica=0.")
    if device == "cpu":
        torch.set_num_threads(max(1, math.ceil(config.cpus_per_replica)))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(
        config.dtype, torch.bfloat16 if device == "cuda" else torch.float32
    )
    folder = read_model_folder(model_uri)
    model = build_from_hf(model_uri, device, dtype)
    num_blocks = -(-config.kv_cache_tokens // config.block_tokens)
    runner = Runner(model, num_blocks, config.block_tokens)
    pool = BlockPool(num_blocks, config.block_tokens)
    scheduler = Scheduler(pool, config.max_num_seqs, config.max_queue, PASS_TOKENS[device])
    return EngineCore(runner, scheduler, Vocabulary(folder.tokenizer), folder.eos_ids), folder
