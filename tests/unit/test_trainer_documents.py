"""Documents in one row: with `data.isolate_documents` each is learned from as if it were alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_service.schema import NO_LABEL, NO_ROW, BatchSlice
from tests.helpers.initial_weights import initialise
from trainer import attention
from trainer.attention import CausalContext, DocumentContext, within_documents
from trainer.batching import MicroBatch, micro_batches, task_rows
from trainer.config import ModelConfig
from trainer.losses import IGNORED
from trainer.model import Transformer, TransformerConfig
from trainer.tasks.causal_lm import CausalLM
from trainer.topology import BatchLayout

SEQ_LEN = 24
SECTION = ModelConfig(d_model=32, num_layers=3, num_heads=4, num_kv_heads=2)
CONFIG = replace(TransformerConfig.from_section(SECTION, vocab_size=70_000, seq_len=SEQ_LEN), init_std=0.3)
CPU = torch.device("cpu")
ROWS = [[9, 7, 9], [3, 22], [25], [11, 5], [1, 1, 23]]
"""Lengths of the documents of each row; the fourth row is padded."""


def delivered(
    rows: list[list[int]], *, isolate: bool, begins_inside: bool = False, masked: int = 0, dtype: str = "uint32"
) -> tuple[BatchSlice, list[list[np.ndarray]]]:
    """A slice with these documents in its rows, `masked` empty slots behind them; and the documents."""
    draw = np.random.default_rng(5)
    count = len(rows) + masked
    tokens = np.zeros((count, SEQ_LEN + 1), dtype=dtype)
    length = np.zeros(count, dtype=np.uint32)
    starts: list[tuple[int, int]] = []
    documents: list[list[np.ndarray]] = []
    for slot, lengths in enumerate(rows):
        place = 0
        documents.append([])
        for number, size in enumerate(lengths):
            if number or not begins_inside:
                starts.append((slot, place))
            own = draw.integers(0, min(CONFIG.vocab_size, np.iinfo(dtype).max), size, dtype=dtype)
            tokens[slot, place : place + size] = own
            documents[-1].append(own)
            place += size
        length[slot] = place
    return (
        BatchSlice(
            index=0,
            slots=(0, count),
            tokens=tokens,
            length=length,
            start_rows=np.array([slot for slot, _ in starts], dtype=np.uint32),
            start_places=np.array([place for _, place in starts], dtype=np.uint32),
            isolate_documents=isolate,
            answer_bits=None,
            labels=None,
            row_id=np.array([*range(len(rows)), *[NO_ROW] * masked], dtype=np.uint64),
            row_crc=np.zeros(count, dtype=np.uint32),
        ),
        documents,
    )


def model() -> Transformer:
    built = Transformer(CONFIG)
    initialise(built.named_parameters(), 7, CONFIG)
    return built.eval()


def whole(rows: BatchSlice) -> MicroBatch:
    """All rows as one micro-batch."""
    (only,) = micro_batches(
        CausalLM(), rows, BatchLayout(len(rows.tokens), 1, 1, len(rows.tokens)), CausalLM().count(rows), CPU
    )
    return only


def alone(built: Transformer, document: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What a document of n tokens gives in a row of its own: n - 1 logits and losses, of its tokens but the first."""
    ids = torch.from_numpy(document.astype(np.int64))[None]
    logits = built(ids[:, :-1])[0]
    return logits, F.cross_entropy(logits, ids[0, 1:], reduction="none")


@pytest.mark.parametrize("begins_inside", [False, True], ids=["packed", "stream"])
def test_logits_and_loss_of_a_row_are_those_of_its_documents_alone(begins_inside: bool) -> None:
    rows, documents = delivered(ROWS, isolate=True, begins_inside=begins_inside, masked=1)
    built = model()
    inputs, targets = whole(rows)
    logits = built(*inputs)
    losses = []
    for slot, own in enumerate(documents):
        place = 0
        for document in own:
            expected, expected_losses = alone(built, document)
            found = logits[slot, place : place + len(document) - 1]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
            losses.append(expected_losses)
            place += len(document)
    plain = torch.cat(losses)
    assert CausalLM().count(rows) == len(plain), "a document of n tokens has n - 1 labels"
    assert CausalLM().loss(built.outputs(*inputs), targets).item() == pytest.approx(plain.mean().item(), rel=1e-5)


def test_what_documents_share_without_isolation_matters() -> None:
    """The comparison above would notice attention or positions that run over a document's start."""
    rows, _ = delivered(ROWS, isolate=True)
    inputs, _ = whole(rows)
    built = model()
    tokens, positions, doc_ids = inputs
    isolated = built(tokens, positions, doc_ids)
    assert not torch.allclose(isolated[0, 9:], built(tokens, positions)[0, 9:], atol=1e-2), "attention"
    places = torch.arange(SEQ_LEN).expand_as(tokens)
    apart = built(tokens, places, doc_ids)
    torch.testing.assert_close(apart, isolated, atol=2e-4, rtol=1e-3)  # rotary angles only know distances
    assert positions[2].tolist() == list(range(SEQ_LEN))
    assert positions[0].tolist() == [*range(9), *range(7), *range(8)]


def test_without_isolation_rows_are_one_text() -> None:
    rows, documents = delivered(ROWS, isolate=False, masked=2)
    (tokens, positions), (labels, weights) = whole(rows)
    assert CausalLM().count(rows) == sum(sum(lengths) - 1 for lengths in ROWS)
    assert torch.equal(positions, torch.arange(SEQ_LEN).expand_as(tokens))
    for slot, own in enumerate(documents):
        text = np.concatenate(own)
        assert labels[slot].tolist() == [*text[1:].tolist(), *[IGNORED] * (SEQ_LEN + 1 - len(text))]
    assert weights.tolist() == pytest.approx([*[1 / CausalLM().count(rows)] * len(ROWS), 0.0, 0.0])
    assert (labels[-2:] == IGNORED).all()


def test_padding_changes_no_other_token() -> None:
    rows, _ = delivered([[11, 5]], isolate=True)
    other = rows.tokens.copy()
    other[0, 16:] = 4242
    built = model()
    padded, changed = (built(*whole(replace(rows, tokens=tokens))[0]) for tokens in (rows.tokens, other))
    assert torch.equal(padded[0, :16], changed[0, :16])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_keep_their_value(dtype: str) -> None:
    rows, _ = delivered([[25]], isolate=False, dtype=dtype)
    rows.tokens[0, 3] = np.iinfo(dtype).max
    (tokens, _), (labels, _) = whole(rows)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens[0].tolist() == rows.tokens[0, :-1].tolist()
    assert labels[0].tolist() == rows.tokens[0, 1:].tolist()


def test_answers_alone_are_learned() -> None:
    """Chats: a bit for each label; a row without answers weighs nothing, and a batch without any has loss 0."""
    rows, _ = delivered([[25], [20], [25]], isolate=True)
    counted = np.zeros((3, SEQ_LEN), dtype=np.bool_)
    counted[0, 5:9] = True
    counted[1, 15:24] = True  # from place 19 on there is padding
    rows = replace(rows, answer_bits=np.packbits(counted, axis=1, bitorder="little"))
    _, (labels, weights) = whole(rows)
    assert (labels != IGNORED).nonzero().tolist() == [*([0, t] for t in range(5, 9)), *([1, t] for t in range(15, 19))]
    assert (weights > 0).tolist() == [True, True, False]
    none = replace(rows, answer_bits=np.zeros_like(rows.answer_bits))
    inputs, targets = whole(none)
    assert CausalLM().count(none) == 0
    assert CausalLM().loss(model().outputs(*inputs), targets).item() == 0.0


def test_no_mask_is_made_for_rows_of_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.tensor([[1] * 6, [0] * 6])
    assert isinstance(within_documents(one), CausalContext)
    assert isinstance(within_documents(torch.tensor([[1] * 6, [0] * 5 + [1]])), DocumentContext)
    built = model()
    rows, _ = delivered([[25], [18]], isolate=True)
    inputs, _ = whole(rows)
    plain = built(*inputs)
    masked = built(*inputs[:2], context=DocumentContext(inputs[2]))
    torch.testing.assert_close(plain, masked, atol=2e-5, rtol=1e-4)
    monkeypatch.setattr(attention, "DocumentContext", None)
    assert torch.equal(built(*inputs), plain)


def test_blocks_share_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attend = F.scaled_dot_product_attention

    def watched(*args: torch.Tensor, attn_mask: torch.Tensor | None, **rest: bool) -> torch.Tensor:
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **rest)

    rows, _ = delivered(ROWS, isolate=True)
    inputs, _ = whole(rows)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model()(*inputs)
    assert len(seen) == CONFIG.num_layers
    assert seen[0] is not None
    assert seen[0].shape == (len(ROWS), 1, SEQ_LEN, SEQ_LEN)
    assert all(one is seen[0] for one in seen)


def test_classes_reach_the_task() -> None:
    """Class numbers travel with their rows, for tasks that learn them."""
    rows, _ = delivered([[25], [10], [12]], isolate=False, masked=1)
    assert all(one.classes_B is None for one in task_rows(rows, BatchLayout(4, 1, 1, 2), CPU))
    rows = replace(rows, labels=np.array([2, NO_LABEL, 0, NO_LABEL], dtype=np.int32))
    found = [one.classes_B for one in task_rows(rows, BatchLayout(4, 1, 1, 2), CPU)]
    assert [one.tolist() for one in found if one is not None] == [[2, -1], [0, -1]]
