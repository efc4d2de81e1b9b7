"""Rows of documents: every label once, no row too long, little waste, and nothing depends on how documents arrive."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_service import packing
from data_service.packing import Packer, Rows

KINDS = ("document", "packed")


def corpus(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that are all different, so that a token tells its place; lengths; answers."""
    sizes = np.array(lengths, dtype=np.uint32)
    tokens = np.arange(int(sizes.sum()), dtype=np.uint32)
    return tokens, sizes, (tokens * 2654435761 >> 7) % 3 == 0


def pack(packer: Packer, lengths: Sequence[int], cuts: Sequence[int] = (), **extra: np.ndarray) -> Rows:
    """All rows of documents that are handed over in pieces [0, cuts[0]), [cuts[0], cuts[1]), …"""
    tokens, sizes, answers = corpus(lengths)
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    bounds = [0, *sorted(cut % (len(lengths) + 1) for cut in cuts), len(lengths)]
    found: list[Rows] = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        of_tokens = slice(ends[first], ends[last])
        given_now = {"answers": answers[of_tokens]} if "answers" in extra else {}
        given_now |= {"labels": extra["labels"][first:last]} if "labels" in extra else {}
        found += packer.add(tokens[of_tokens], sizes[first:last], **given_now)
    return Rows.concatenate(found + packer.close())


def rows_of(rows: Rows) -> list[np.ndarray]:
    return np.split(rows.tokens, rows.row_offsets[1:-1].astype(int))


documents = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@settings(deadline=None)
@given(documents, st.integers(2, 20), st.sampled_from(KINDS), st.integers(1, 9))
def test_every_token_but_a_documents_first_is_a_label_once(
    lengths: list[int], size: int, kind: str, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_PIECES", window)
        packer = Packer(size, kind)
        rows = pack(packer, lengths)
    tokens, sizes, _ = corpus(lengths)
    firsts = np.cumsum(sizes) - sizes
    is_start = np.zeros(rows.tokens.size, dtype=bool)
    is_start[rows.starts] = True
    is_start[rows.row_offsets[:-1].astype(int)] = True  # a row's place 0 is no label of it
    labels = rows.tokens[~is_start]
    np.testing.assert_array_equal(np.sort(labels), np.setdiff1d(tokens, firsts))
    # What stands in front of a label is the token in front of it in its document.
    np.testing.assert_array_equal(rows.tokens[np.flatnonzero(~is_start) - 1], labels - 1)
    # Document starts are marked, and in the middle of a row so is a piece that goes on.
    begins = rows.tokens[rows.starts]
    assert set(firsts.tolist()) <= set(begins.tolist())
    assert not np.isin(rows.starts[~np.isin(begins, firsts)], rows.row_offsets).any()
    assert all(1 <= row.size <= size for row in rows_of(rows))
    assert packer.num_documents == len(lengths)
    assert packer.num_tokens == tokens.size
    assert packer.num_rows == rows.num_rows
    assert packer.num_truncated == 0


@settings(deadline=None)
@given(documents, st.integers(2, 20), st.sampled_from(KINDS), st.lists(st.integers(0, 60), max_size=5))
def test_rows_do_not_depend_on_how_documents_arrive(lengths: list[int], size: int, kind: str, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_PIECES", 7)
        patch.setattr(packing, "_WINDOW_TOKENS", 64)
        patch.setattr(packing, "_WINDOW_ROWS", 1)
        once = pack(Packer(size, kind, with_answers=True), lengths, answers=np.array(()))
        often = pack(Packer(size, kind, with_answers=True), lengths, cuts, answers=np.array(()))
    for name in ("tokens", "row_offsets", "starts", "answers"):
        np.testing.assert_array_equal(getattr(once, name), getattr(often, name), strict=True)


@settings(deadline=None)
@given(st.lists(st.integers(2, 100), min_size=1, max_size=200), st.integers(100, 140))
def test_packing_takes_few_more_rows_than_it_must(lengths: list[int], size: int) -> None:
    """Best-fit decreasing takes at most 3/2 of the bound L2 of Martello and Toth, and one row."""
    rows = pack(Packer(size, "packed"), lengths)
    bound = 0
    for small in range(size // 2 + 1):
        large = [length for length in lengths if length > size - small]
        middle = [length for length in lengths if size / 2 < length <= size - small]
        little = [length for length in lengths if small <= length <= size / 2]
        room = len(middle) * size - sum(middle)
        bound = max(bound, len(large) + len(middle) + max(0, -(-(sum(little) - room) // size)))
    assert bound <= rows.num_rows <= 1.5 * bound + 1


def test_text_of_many_lengths_fills_rows() -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(5, 1, 20_000)).astype(int).tolist()
    rows = pack(Packer(1025, "packed"), lengths)
    assert rows.tokens.size > 0.995 * 1025 * rows.num_rows


def test_packed_rows_keep_documents_together_and_near_their_place() -> None:
    rows = rows_of(pack(Packer(10, "packed"), [6, 7, 4, 3, 10, 2]))
    assert [row.tolist() for row in rows] == [
        [*range(6), *range(13, 17)],
        [*range(6, 13), *range(17, 20)],
        [*range(20, 30)],
        [30, 31],
    ]


def test_the_rest_of_a_long_document_comes_first_in_its_row() -> None:
    rows = pack(Packer(10, "packed"), [4, 23, 7])
    assert [row.tolist() for row in rows_of(rows)] == [
        [*range(22, 27), 0, 1, 2, 3],
        [*range(4, 14)],
        [*range(13, 23)],
        [*range(27, 34)],
    ]
    places = [rows.starts[(rows.starts >= a) & (rows.starts < b)] - a for a, b in _bounds(rows)]
    assert [place.tolist() for place in places] == [[5], [0], [], [0]]


def _bounds(rows: Rows) -> list[tuple[int, int]]:
    offsets = rows.row_offsets.astype(int).tolist()
    return list(zip(offsets, offsets[1:], strict=False))


def test_chats_and_labelled_texts_lose_their_end_and_are_counted() -> None:
    packer = Packer(5, "document", truncate=True, with_answers=True, with_labels=True)
    rows = pack(packer, [3, 9, 5, 6], answers=np.array(()), labels=np.array([2, 0, -1, 1], dtype=np.int32))
    assert [row.tolist() for row in rows_of(rows)] == [[0, 1, 2], [3, 4, 5, 6, 7], [*range(12, 17)], [*range(17, 22)]]
    assert rows.labels is not None
    assert rows.labels.tolist() == [2, 0, -1, 1]
    assert (packer.num_truncated, packer.num_tokens, packer.num_documents) == (2, 18, 4)
    _, _, answers = corpus([3, 9, 5, 6])
    np.testing.assert_array_equal(rows.answers, answers[rows.tokens])
    packed = Packer(5, "packed", truncate=True)
    assert [row.tolist() for row in rows_of(pack(packed, [9, 2, 3]))] == [[*range(5)], [9, 10, 11, 12, 13]]
    assert packed.num_truncated == 1


def test_documents_without_answers_count_whole_where_the_dataset_has_masks() -> None:
    rows = pack(Packer(5, "packed", with_answers=True), [3, 9])
    assert rows.answers is not None
    assert rows.answers.all()
    assert pack(Packer(5, "packed"), [3, 9]).answers is None


@settings(deadline=None)
@given(documents, st.integers(2, 20), st.sampled_from(KINDS), st.data())
def test_a_slice_of_rows_is_those_rows(lengths: list[int], size: int, kind: str, data: st.DataObject) -> None:
    rows = pack(Packer(size, kind, with_answers=True), lengths, answers=np.array(()))
    first = data.draw(st.integers(0, rows.num_rows))
    last = data.draw(st.integers(first, rows.num_rows))
    cut = [rows.slice(a, b) for a, b in ((0, first), (first, last), (last, rows.num_rows)) if a < b]
    joined = Rows.concatenate(cut)
    for name in ("tokens", "row_offsets", "starts", "answers"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(rows, name), strict=True)
    if first < last:
        part = rows.slice(first, last)
        np.testing.assert_array_equal(part.tokens, np.concatenate(rows_of(rows)[first:last]))
        assert part.row_offsets[0] == 0
        assert part.num_rows == last - first


def test_what_does_not_fit_together_is_refused() -> None:
    tokens = np.arange(4, dtype=np.uint16)
    with pytest.raises(ValueError, match="sum to 3, not 4"):
        Packer(5, "packed").add(tokens, np.array([1, 2]))
    with pytest.raises(ValueError, match="sum to 4, not 4"):
        Packer(5, "packed").add(tokens, np.array([0, 4]))
    with pytest.raises(ValueError, match="made without"):
        Packer(5, "packed").add(tokens, np.array([4]), answers=np.ones(4, dtype=bool))
    with pytest.raises(ValueError, match="carry no class"):
        Packer(5, "packed", with_labels=True)
    with pytest.raises(ValueError, match="row_tokens=1"):
        Packer(1, "document")
    assert Packer(5, "packed").add(tokens[:0], np.zeros(0, np.uint32)) == []
    assert Packer(5, "packed").close() == []
