"""Greedy continuations of prompts by the model that is being trained, on whatever mesh it is.

Each token is one forward pass over whole rows, without a cache: a few short texts at an evaluation, to be looked at.
All ranks take part with the same rows, because ZeRO 3 gathers weights by collectives and a pipeline passes rows on.

Shape letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch import distributed as dist

from data_service.schema import BatchSlice
from trainer.batching import RowSource
from trainer.deepspeed_engine import TrainEngine
from trainer.layers import Outputs, Projection
from trainer.protocol import Sample, SampleWishes
from trainer.tasks.base import Targets, Task
from trainer.tasks.rows import TaskRows

__all__ = ["generate_samples"]


def generate_samples(
    engine: TrainEngine, task: Task, client: RowSource, wishes: SampleWishes, seq_len: int
) -> tuple[Sample, ...]:
    """Continue prompts greedily. A collective: every rank calls it, with the same wishes.

    Args:
        engine: holds the model.
        task: what is learned; its model must be a language model.
        client: of the data service, for the beginnings of held-out rows.
        wishes: what to continue.
        seq_len: tokens that the model takes at most.

    Returns:
        One sample for each prompt; on every rank the same.
    """
    prompts, has_documents = _prompts(engine, client, wishes, seq_len)
    samples: list[Sample] = []
    rows = engine.layout.micro_batch
    for first in range(0, len(prompts), rows):
        chunk = prompts[first : first + rows]
        samples += _continue(engine, task, chunk, wishes.max_tokens, seq_len, has_documents=has_documents)
    return tuple(samples)


def _prompts(
    engine: TrainEngine, client: RowSource, wishes: SampleWishes, seq_len: int
) -> tuple[list[tuple[int, ...]], bool]:
    """What to continue, the same on all ranks, and whether rows carry documents (then the model's inputs do)."""
    found: list[tuple[int, ...]] = []
    has_documents = False
    if engine.consumes_rows:
        rows = next(client.stream("eval", 0, 1, engine.layout.slots(0)))
        has_documents = bool(rows.isolate_documents)
        found = [prompt[: seq_len - 1] for prompt in wishes.prompts] or _beginnings(rows, wishes)
    longest = max((len(prompt) for prompt in found), default=0)
    sizes = torch.tensor([len(found), longest, has_documents], dtype=torch.int64, device=engine.device)
    dist.broadcast(sizes, src=0)
    num_prompts, longest, has_documents = int(sizes[0]), int(sizes[1]), bool(sizes[2])
    # one row a prompt: its length, then its tokens
    told = torch.zeros(num_prompts, 1 + longest, dtype=torch.int64, device=engine.device)
    for index, prompt in enumerate(found):
        told[index, : 1 + len(prompt)] = torch.tensor((len(prompt), *prompt))
    dist.broadcast(told, src=0)
    return [tuple(row[1 : 1 + row[0]]) for row in told.tolist()], has_documents


def _beginnings(rows: BatchSlice, wishes: SampleWishes) -> list[tuple[int, ...]]:
    """Beginnings of held-out rows; where a row's first words are not learned (a chat's question), all of those."""
    found: list[tuple[int, ...]] = []
    for tokens, counted in zip(rows.tokens, rows.loss_mask, strict=True):
        if len(found) == wishes.count:
            break
        if not counted.any():
            continue
        first = int(counted.argmax())
        length = first + 1 if first > 0 else min(wishes.prompt_tokens, int(counted.sum()))
        found.append(tuple(int(token) for token in tokens[:length]))
    return found


def _continue(
    engine: TrainEngine,
    task: Task,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    seq_len: int,
    *,
    has_documents: bool,
) -> list[Sample]:
    """One micro-batch of prompts; rows are padded behind, where causal attention does not look."""
    lengths = [len(prompt) for prompt in prompts]
    grown = [list(prompt) for prompt in prompts]
    piped = engine.mesh.pp > 1
    for _ in range(max_tokens):
        if max(len(row) for row in grown) >= seq_len:
            break
        # a pipeline's buffers have one shape
        width = seq_len if piped else max(len(row) for row in grown)
        num_rows = engine.layout.micro_batch if piped else len(grown)
        tokens_BT1 = torch.zeros(num_rows, width + 1, dtype=torch.int64)
        for index, row in enumerate(grown):
            tokens_BT1[index, : len(row)] = torch.tensor(row)
        last = torch.tensor([len(row) - 1 for row in grown], device=engine.device)
        chosen = _next_tokens(engine, task, tokens_BT1.to(engine.device), last, has_documents=has_documents)
        for row, token in zip(grown, chosen, strict=True):
            row.append(token)
    return [Sample(tuple(row[:length]), tuple(row[length:])) for row, length in zip(grown, lengths, strict=True)]


def _next_tokens(
    engine: TrainEngine, task: Task, tokens_BT1: Tensor, last: Tensor, *, has_documents: bool
) -> list[int]:
    """The likeliest token after position `last` of each row."""
    num_rows, width = tokens_BT1.shape[0], tokens_BT1.shape[1] - 1
    tokens_BT = tokens_BT1[:, :-1].contiguous()
    positions_BT = torch.arange(width, device=engine.device).expand(num_rows, width).contiguous()
    inputs = (tokens_BT, positions_BT, *([torch.zeros_like(tokens_BT)] if has_documents else []))
    nothing_counts = torch.zeros_like(tokens_BT, dtype=torch.bool)
    targets = task.targets(TaskRows(tokens_BT1, nothing_counts, None), 0.0)
    chosen = torch.zeros(len(last), dtype=torch.int64, device=engine.device)

    def look(outputs: Outputs, _: Targets) -> None:
        assert isinstance(outputs, Projection), "a language model projects"
        at = torch.arange(len(last), device=engine.device)
        normed_B1D = outputs.normed_BTD[at, last][:, None]
        chosen.copy_(replace(outputs, normed_BTD=normed_B1D).logits()[:, 0].argmax(dim=-1))

    engine.look((inputs, targets), look)
    dist.broadcast(chosen, src=engine.mesh.reporter)
    return [int(token) for token in chosen.tolist()]
