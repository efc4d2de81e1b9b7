"""Rows of several documents, kept apart: every mesh trains as if each document were alone."""

import contextlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_service.access import DataAccess
from data_service.client import DataClient
from data_service.config import DataConfig, RowKind
from data_service.plan import OrderSpec
from data_service.schema import BatchSlice
from tests.helpers.data_runs import running_service
from tests.helpers.initial_weights import initialise
from tests.helpers.row_service import row_service, served, write_corpus
from tests.helpers.written_datasets import WrittenPart, random_documents, write_dataset
from tests.ranks.conftest import GLOBAL_BATCH, SEED, SEQ_LEN, Case, Lab
from trainer.model import Transformer, TransformerConfig
from trainer.optim import group_parameters, lr_at, make_optimizer
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


def _tokens(rows: BatchSlice) -> int:
    """What goes through the model, whether it counts in the loss or not."""
    return int((rows.length[rows.rows].astype(np.int64) - 1).sum())


def _mean_loss(model: Transformer, documents: list[torch.Tensor]) -> torch.Tensor:
    """Mean loss over all tokens but each document's first, one document at a time."""
    losses = [F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none") for ids in documents if len(ids) > 1]
    return torch.cat(losses).mean()


def _alone(spec: WorkerSpec, access: DataAccess) -> tuple[list[tuple[float, int]], float]:
    """Loss and tokens of each step, and the evaluation loss before them, of a plain loop over single documents."""
    config = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)
    model = Transformer(config)
    initialise(model.named_parameters(), spec.seed, config)
    optimizer = make_optimizer(group_parameters(model.named_parameters(), spec.train.optimizer), spec.train.optimizer)
    steps = []
    with contextlib.closing(DataClient(access)) as client:
        batches = client.plan("eval").num_batches
        held_out = [one for rows in client.stream("eval", 0, batches, (0, GLOBAL_BATCH)) for one in _documents(rows)]
        with torch.no_grad():
            before = _mean_loss(model, held_out).item()
        for rows in client.stream("train", 0, STEPS, (0, GLOBAL_BATCH)):
            loss = _mean_loss(model, _documents(rows))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.train.optimizer.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(len(steps), spec.train)
            optimizer.step()
            optimizer.zero_grad()
            steps.append((loss.item(), _tokens(rows)))
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
    assert all(tokens == whole[step].tokens for step, (_, tokens) in enumerate(isolated, 1)), "as much is computed"
    assert any(abs(loss / whole[step].loss - 1) > 2e-3 for step, (loss, _) in enumerate(isolated, 1))


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)


def _chats_and_texts(folder: Path) -> DataConfig:
    """Chats beside plain text, packed into rows."""
    folder.mkdir()
    write_corpus(folder / "texts.csv", num_documents=60, seed=1)
    (folder / "chat.jinja").write_text(TEMPLATE)
    draw = random.Random(3)
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(120):
            sea, wind = draw.choice(("calm", "rough", "grey")), draw.choice(("north", "south", "no"))
            asked = {"role": "user", "content": f"How is the sea, {number}?"}
            told = {"role": "assistant", "content": f"The sea is {sea}, with {wind} wind."}
            file.write(json.dumps({"messages": [asked, told]}) + "\n")
    return DataConfig.model_validate(
        {
            "sources": [{"path": f"{folder}/texts.csv"}, {"path": f"{folder}/chats.jsonl", "messages": "messages"}],
            "tokenizer": {"train": {"vocab_size": 384}},
            "chat_template": f"{folder}/chat.jinja",
            "rows": "packed",
            "seq_len": 64,
            "isolate_documents": True,
            "split": {"eval": 0},
            "shard_tokens": 2048,
        }
    )


def test_every_mesh_learns_answers_alone_from_chats(lab: Lab) -> None:
    config = _chats_and_texts(lab.folder / "chats")
    with served(config, lab.folder / "chats" / "dataset", GLOBAL_BATCH, SEED) as service:
        found, counted = {}, []
        for case in (Case(1, 1), Case(1, 2), Case(2, 1)):
            spec = lab.spec(case, lab.folder / f"chats-{case}", steps=STEPS)
            spec = replace(spec, data=service.access, vocab_size=service.manifest.vocab_size, seq_len=64)
            found[case] = lab.run(spec).steps
        shape = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)
        model = Transformer(shape)
        initialise(model.named_parameters(), spec.seed, shape)
        with contextlib.closing(DataClient(service.access)) as client:
            batches = list(client.stream("train", 0, STEPS, (0, GLOBAL_BATCH)))
    for rows in batches:
        every = (np.arange(1, 65) < rows.length[:, None]) & ~rows.doc_starts[:, 1:]
        counted.append((int(rows.loss_mask.sum()), int(every.sum())))
    assert all(some < all_of_them for some, all_of_them in counted), "questions are learned as well"
    ids = torch.from_numpy(batches[0].tokens.astype(np.int64))
    places, documents = (torch.from_numpy(one.astype(np.int64)) for one in (batches[0].positions, batches[0].doc_ids))
    mask = torch.from_numpy(batches[0].loss_mask)
    first = F.cross_entropy(model(ids[:, :-1], places, documents)[mask], ids[:, 1:][mask]).item()
    for case, steps in found.items():
        assert [steps[step].tokens for step in sorted(steps)] == [_tokens(rows) for rows in batches], case
        assert steps[1].loss == pytest.approx(first, rel=1e-4), case
        for step, expected in found[Case(1, 1)].items():
            assert steps[step].loss == pytest.approx(expected.loss, rel=2e-3), (case, step)


def test_a_batch_without_a_label_has_no_loss(lab: Lab) -> None:
    """Every mesh says so, and takes the step: it is not a loss of nought."""
    documents = random_documents(3, 4000, longest=SEQ_LEN + 1)
    part = WrittenPart("asked", documents, answers=[np.zeros(one.size, bool) for one in documents])
    written = write_dataset(
        lab.folder / "asked", {"train": [part], "eval": []}, rows="document", seq_len=SEQ_LEN, loss_masks=True
    )
    order = OrderSpec(SEED, SEQ_LEN, GLOBAL_BATCH, 2)
    with running_service(written.uri, order) as service:
        for case in (Case(1, 1), Case(1, 2)):
            spec = lab.spec(case, lab.folder / f"asked-{case}", steps=4)
            spec = replace(spec, data=service.access(), vocab_size=written.manifest.vocab_size)
            found = lab.run(spec).steps
            assert [found[step].loss for step in range(1, 5)] == [None] * 4, case
            assert all(found[step].tokens > 0 for step in range(1, 5)), "its rows go through the model all the same"
            assert all(found[step].grad_norm == 0 for step in range(1, 5))
