"""A training loop without DeepSpeed, micro-batches or weights: the oracle of the rank tests."""

import contextlib
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from data_service.client import DataClient
from tests.helpers.initial_weights import initialise
from trainer.model import Transformer, TransformerConfig
from trainer.optim import group_parameters, lr_at, make_optimizer, set_lr
from trainer.protocol import WorkerSpec

__all__ = ["PlainStep", "train_plainly"]


@dataclass(frozen=True)
class PlainStep:
    """One step of the oracle."""

    loss: float
    grad_norm: float
    tokens: int


def train_plainly(spec: WorkerSpec, steps: int) -> dict[int, PlainStep]:
    """Mean loss over the valid tokens of each global batch, clipped, one update: step to what was seen."""
    config = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)
    model = Transformer(config)
    initialise(model.named_parameters(), spec.seed, config)
    optimizer = make_optimizer(group_parameters(model.named_parameters(), spec.train.optimizer), spec.train.optimizer)
    done: dict[int, PlainStep] = {}
    with contextlib.closing(DataClient(spec.data)) as client:
        for rows in client.stream("train", 0, steps, (0, spec.train.global_batch)):
            tokens = torch.from_numpy(rows.tokens.astype("int64"))
            counted = torch.arange(spec.seq_len) < torch.from_numpy(rows.valid_tokens.astype("int64"))[:, None]
            loss = F.cross_entropy(model(tokens[:, :-1])[counted], tokens[:, 1:][counted])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.train.optimizer.grad_clip)
            set_lr(optimizer, lr_at(rows.index, spec.train))
            optimizer.step()
            optimizer.zero_grad()
            done[rows.index + 1] = PlainStep(loss.item(), norm.item(), int(counted.sum()))
    return done
