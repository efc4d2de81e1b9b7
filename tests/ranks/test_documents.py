"""Rows of several documents, kept apart: every mesh trains as if each document were alone."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_service.access import DataAccess
from data_service.client import DataClient
from data_service.config import RowKind
from data_service.schema import BatchSlice
from tests.helpers.initial_weights import initialise
from tests.helpers.row_service import row_service
from tests.ranks.conftest import GLOBAL_BATCH, SEED, SEQ_LEN, Case, Lab
from trainer.model import Transformer, TransformerConfig
from trainer.optim import lr_at, make_optimizer
from trainer.protocol import WorkerSpec

STEPS = 6
CASES = [Case(1, 1), Case(1, 2), Case(2, 1), Case(2, 2)]


def _documents(rows: BatchSlice) -> list[torch.Tensor]:
    """Each document, or piece of one, of the rows as ids of its own."""
    found = []
    for slot in np.nonzero(rows.rows)[0]:
        begins = rows.start_places[rows.start_rows == slot]
        edges = sorted({0, *begins.tolist(), int(rows.length[slot])})
        ids = torch.from_numpy(rows.tokens[slot].astype(np.int64))
        found.extend(ids[begin:end] for begin, end in zip(edges, edges[1:], strict=False))
    return found


def _mean_loss(model: Transformer, documents: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Mean loss over all tokens but each document's first, one document at a time."""
    losses = [F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none") for ids in documents if len(ids) > 1]
    every = torch.cat(losses)
    return every.mean(), len(every)


def _alone(spec: WorkerSpec, access: DataAccess) -> tuple[list[tuple[float, int]], float]:
    """Loss and tokens of each step, and the evaluation loss before them, of a plain loop over single documents."""
    config = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)
    model = Transformer(config)
    initialise(model.named_parameters(), spec.seed, config)
    optimizer = make_optimizer(model.named_parameters(), spec.train.optimizer)
    steps = []
    with contextlib.closing(DataClient(access)) as client:
        batches = client.plan("eval").num_batches
        held_out = [one for rows in client.stream("eval", 0, batches, (0, GLOBAL_BATCH)) for one in _documents(rows)]
        with torch.no_grad():
            before = _mean_loss(model, held_out)[0].item()
        for rows in client.stream("train", 0, STEPS, (0, GLOBAL_BATCH)):
            loss, tokens = _mean_loss(model, _documents(rows))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.train.optimizer.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(len(steps), spec.train)
            optimizer.step()
            optimizer.zero_grad()
            steps.append((loss.item(), tokens))
    return steps, before


@pytest.mark.parametrize("rows", ["stream", "packed"])
def test_every_mesh_trains_as_on_documents_alone(lab: Lab, rows: RowKind) -> None:
    with row_service(lab.folder, SEQ_LEN, GLOBAL_BATCH, SEED, rows=rows, isolate_documents=True) as service:
        spec = replace(lab.spec(CASES[0], lab.folder, steps=STEPS), vocab_size=service.manifest.vocab_size)
        expected, before = _alone(spec, service.access)
        found = {}
        for case in CASES:
            spec = lab.spec(case, lab.folder / f"documents-{rows}-{case}", steps=STEPS)
            spec = replace(spec, data=service.access, vocab_size=service.manifest.vocab_size)
            found[case] = lab.run(spec)
    for case, outcome in found.items():
        assert outcome.evals[0].loss == pytest.approx(before, rel=1e-4), case
        for step, (loss, tokens) in enumerate(expected, 1):
            assert outcome.steps[step].loss == pytest.approx(loss, rel=2e-3), (case, step)
            assert outcome.steps[step].tokens == tokens, (case, step)
    hashes = {tuple(report.sample_hash for report in outcome.steps.values()) for outcome in found.values()}
    assert len(hashes) == 1


def test_whole_rows_give_another_loss(lab: Lab) -> None:
    """The comparison above would notice documents that are not kept apart."""
    with row_service(lab.folder, SEQ_LEN, GLOBAL_BATCH, SEED, isolate_documents=True) as service:
        spec = lab.spec(Case(1, 1), lab.folder, steps=STEPS)
        isolated, _ = _alone(spec, service.access)
    whole = lab.reference(Case(1, 1)).steps
    assert all(tokens < whole[step].tokens for step, (_, tokens) in enumerate(isolated, 1))
    assert any(abs(loss / whole[step].loss - 1) > 2e-3 for step, (loss, _) in enumerate(isolated, 1))
