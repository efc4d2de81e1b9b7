"""Documents → rows of at most seq_len + 1 tokens, where rows are fixed at prepare (`document` and `packed`).

A document that is longer than a row is cut into pieces that overlap by one token, so that each of its tokens but the
first is a label in exactly one of them; or, where it must stay one row (chats, labelled texts), it loses its end.
`document`: one piece a row. `packed`: best-fit decreasing (Johnson et al., "Worst-Case Performance Bounds for Simple
One-Dimensional Packing Algorithms", SIAM J. Comput. 3, 1974) over windows of consecutive pieces; no piece is cut to
fill a row. Windows follow from the sequence of documents alone, never from the calls that it arrives in.

Owns this cutting and packing. Refuses to know shards, files and text; pads nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

__all__ = ["WINDOW_PIECES", "Packer", "Rows"]

WINDOW_PIECES = 8192
"""Most pieces that are packed together."""
_WINDOW_TOKENS = 1 << 22
_WINDOW_ROWS = 16
_NO_LABEL = -1

_I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one part, n of them with S tokens in all."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[S] in the dtype that was given."""
    row_offsets: npt.NDArray[np.uint64]
    """[n+1]: row i is tokens[row_offsets[i]:row_offsets[i+1]]; never empty."""
    starts: npt.NDArray[np.uint32]
    """[D], ascending: places in `tokens` where a document begins, or goes on behind another one in the same row."""
    answers: npt.NDArray[np.bool_] | None
    """[S]: this token counts as a label; None where the packer was made without."""
    labels: npt.NDArray[np.int32] | None
    """[n]: class of the row, -1 where there is none; None where the packer was made without."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return self.row_offsets.size - 1

    def slice(self, first: int, last: int) -> "Rows":
        """Rows [first, last) as a value of their own; tokens and answers are views."""
        begin, end = int(self.row_offsets[first]), int(self.row_offsets[last])
        low, high = np.searchsorted(self.starts, [begin, end])
        return Rows(
            tokens=self.tokens[begin:end],
            row_offsets=self.row_offsets[first : last + 1] - np.uint64(begin),
            starts=self.starts[low:high] - np.uint32(begin),
            answers=None if self.answers is None else self.answers[begin:end],
            labels=None if self.labels is None else self.labels[first:last],
        )

    @classmethod
    def concatenate(cls, parts: "list[Rows]") -> Self:
        """Rows of several values, in order; all made by packers of the same settings, at least one."""
        sizes = [part.tokens.size for part in parts]
        before = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.uint64)]).astype(np.uint64)
        offsets = [part.row_offsets[1:] + shift for part, shift in zip(parts, before, strict=True)]
        starts = [part.starts + shift.astype(np.uint32) for part, shift in zip(parts, before, strict=True)]
        answers = [part.answers for part in parts if part.answers is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            row_offsets=np.concatenate([np.zeros(1, np.uint64), *offsets]),
            starts=np.concatenate(starts),
            answers=np.concatenate(answers) if answers else None,
            labels=np.concatenate(labels) if labels else None,
        )


@dataclass(frozen=True)
class _Pieces:
    """Pieces of documents, p of them, over a buffer of tokens."""

    begin: _I64
    """[p]: place of the first token in the buffer, ascending."""
    length: _I64
    """[p]: 1 … row_tokens."""
    goes_on: npt.NDArray[np.bool_]
    """[p]: not a document's first piece."""
    label: npt.NDArray[np.int32]
    """[p]: class of the document."""

    def slice(self, first: int, last: int, shift: int = 0) -> "_Pieces":
        part = slice(first, last)
        return _Pieces(self.begin[part] - shift, self.length[part], self.goes_on[part], self.label[part])


class Packer:
    """Makes the rows of one part (one source in one split) from its documents, in order.

    `add` is given any number of whole documents at a time and returns the rows that are finished; `close` returns the
    others. All rows together depend on the sequence of documents alone. Packed rows wait until their window is full:
    at most WINDOW_PIECES pieces, and about 4 M tokens (16 rows where those are more).
    """

    def __init__(
        self,
        row_tokens: int,
        kind: Literal["document", "packed"],
        *,
        truncate: bool = False,
        with_answers: bool = False,
        with_labels: bool = False,
    ) -> None:
        """Set up.

        Args:
            row_tokens: most tokens of a row, seq_len + 1; 2 or more.
            kind: how rows are made.
            truncate: a document longer than a row loses its end, instead of being cut into pieces (chats, labelled
                texts).
            with_answers: the dataset has masks of the labels that count; documents given without one have all bits set.
            with_labels: the dataset has classes; documents given without one have -1. Only with `document` rows.
        """
        if row_tokens < 2:
            raise ValueError(f"row_tokens={row_tokens}: a row holds 2 tokens at least, one of them as a label.")
        if with_labels and kind != "document":
            raise ValueError(f"rows of kind {kind} hold several documents and carry no class.")
        self.num_documents = 0
        """Documents that were added."""
        self.num_tokens = 0
        """Their tokens, without what was cut off and without the repeated tokens of pieces."""
        self.num_truncated = 0
        """Documents that lost their end."""
        self.num_rows = 0
        """Rows that were returned."""
        self._row_tokens = row_tokens
        self._kind = kind
        self._truncate = truncate
        self._with_answers = with_answers
        self._with_labels = with_labels
        self._window_tokens = max(_WINDOW_TOKENS, _WINDOW_ROWS * row_tokens)
        self._held: list[tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.bool_] | None, _Pieces]] = []
        self._held_pieces = 0
        self._held_tokens = 0

    def add(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        lengths: npt.NDArray[np.integer],
        *,
        answers: npt.NDArray[np.bool_] | None = None,
        labels: npt.NDArray[np.int32] | None = None,
    ) -> list[Rows]:
        """Take documents; return rows that are finished, in order (often none).

        Args:
            tokens: [S], uint16 or uint32, the documents one after the other, end tokens included; kept by reference
                until their rows are made.
            lengths: [d], tokens of each document, 1 or more; they sum to S.
            answers: [S], which tokens count as labels; only for packers made with_answers.
            labels: [d], classes; only for packers made with_labels.

        Raises:
            ValueError: for lengths that do not fit, or answers or labels that the packer was made without.
        """
        if int(lengths.sum()) != tokens.size or (lengths.size and int(lengths.min()) < 1):
            raise ValueError(f"lengths of {lengths.size} documents sum to {int(lengths.sum())}, not {tokens.size}.")
        if (answers is not None and not self._with_answers) or (labels is not None and not self._with_labels):
            raise ValueError("answers or labels were given to a packer that was made without.")
        if not lengths.size:
            return []
        if self._with_answers and answers is None:
            answers = np.ones(tokens.size, dtype=np.bool_)
        classes = np.full(lengths.size, _NO_LABEL, dtype=np.int32) if labels is None else labels
        pieces = self._cut(lengths.astype(np.int64), classes)
        self.num_documents += lengths.size
        if self._kind == "document":
            return [self._rows(tokens, answers, pieces, np.arange(pieces.begin.size + 1, dtype=np.int64))]
        self._held.append((tokens, answers, pieces))
        self._held_pieces += pieces.begin.size
        self._held_tokens += int(pieces.length.sum())
        if self._held_pieces < WINDOW_PIECES and self._held_tokens < self._window_tokens:
            return []
        return list(self._windows(last=False))

    def close(self) -> list[Rows]:
        """Return the rows that were not finished. The packer takes no more documents."""
        return list(self._windows(last=True)) if self._held else []

    def _cut(self, lengths: _I64, classes: npt.NDArray[np.int32]) -> _Pieces:
        """The pieces of documents that lie one after the other."""
        begins = np.cumsum(lengths) - lengths
        size = self._row_tokens
        long = lengths > size
        if self._truncate or not long.any():
            self.num_truncated += int(long.sum())
            kept = np.minimum(lengths, size)
            self.num_tokens += int(kept.sum())
            return _Pieces(begins, kept, np.zeros(lengths.size, dtype=np.bool_), classes)
        self.num_tokens += int(lengths.sum())
        counts = np.maximum(1, -(-(lengths - 1) // (size - 1)))
        document = np.repeat(np.arange(lengths.size), counts)
        number = np.arange(document.size) - np.repeat(np.cumsum(counts) - counts, counts)
        offset = number * (size - 1)
        return _Pieces(
            begin=begins[document] + offset,
            length=np.minimum(lengths[document] - offset, size),
            goes_on=number > 0,
            label=classes[document],
        )

    def _windows(self, *, last: bool) -> Iterator[Rows]:
        """Rows of all windows that are full, and with `last` of the rest."""
        tokens = np.concatenate([held[0] for held in self._held])
        masks = [held[1] for held in self._held if held[1] is not None]
        answers = np.concatenate(masks) if masks else None
        shifts = np.concatenate([[0], np.cumsum([held[0].size for held in self._held[:-1]])]).astype(np.int64)
        pieces = _Pieces(
            begin=np.concatenate([held[2].begin + shift for held, shift in zip(self._held, shifts, strict=True)]),
            length=np.concatenate([held[2].length for held in self._held]),
            goes_on=np.concatenate([held[2].goes_on for held in self._held]),
            label=np.concatenate([held[2].label for held in self._held]),
        )
        ends = np.cumsum(pieces.length)
        first = 0
        while first < ends.size:
            done = int(ends[first - 1]) if first else 0
            by_tokens = int(np.searchsorted(ends, done + self._window_tokens)) + 1
            behind = min(first + WINDOW_PIECES, by_tokens)
            if behind > ends.size and not last:
                break
            yield self._packed(tokens, answers, pieces.slice(first, behind))
            first = min(behind, ends.size)
        self._held = []
        if first < ends.size:
            keep = int(pieces.begin[first])
            rest = pieces.slice(first, ends.size, shift=keep)
            self._held = [(tokens[keep:].copy(), None if answers is None else answers[keep:].copy(), rest)]
        self._held_pieces = ends.size - first
        self._held_tokens = int(pieces.length[first:].sum())

    def _packed(
        self, tokens: npt.NDArray[np.unsignedinteger], answers: npt.NDArray[np.bool_] | None, pieces: _Pieces
    ) -> Rows:
        """Rows of one window: in the order of each row's first piece, a piece that goes on in front in its row."""
        row = _best_fit(pieces.length, self._row_tokens)
        count = int(row.max()) + 1
        earliest = np.full(count, row.size, dtype=np.int64)
        np.minimum.at(earliest, row, np.arange(row.size))
        place = np.empty(count, dtype=np.int64)
        place[np.argsort(earliest)] = np.arange(count)
        row = place[row]
        order = np.lexsort((~pieces.goes_on, row))
        bounds = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count))])
        chosen = _Pieces(pieces.begin[order], pieces.length[order], pieces.goes_on[order], pieces.label[order])
        return self._rows(tokens, answers, chosen, bounds)

    def _rows(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        answers: npt.NDArray[np.bool_] | None,
        pieces: _Pieces,
        bounds: _I64,
    ) -> Rows:
        """Gather rows; row i holds the pieces bounds[i] … bounds[i+1]-1."""
        ends = np.cumsum(pieces.length)
        begins = ends - pieces.length
        if np.array_equal(pieces.begin, begins) and tokens.size == ends[-1]:
            taken, mask = tokens, answers
        else:
            index = np.arange(ends[-1]) + np.repeat(pieces.begin - begins, pieces.length)
            taken, mask = tokens[index], None if answers is None else answers[index]
        is_start = ~pieces.goes_on
        is_start[np.setdiff1d(np.arange(is_start.size), bounds[:-1], assume_unique=True)] = True
        self.num_rows += bounds.size - 1
        return Rows(
            tokens=taken,
            row_offsets=np.concatenate([[0], ends])[bounds].astype(np.uint64),
            starts=begins[is_start].astype(np.uint32),
            answers=mask,
            labels=pieces.label[bounds[:-1]] if self._with_labels else None,
        )


def _best_fit(lengths: _I64, capacity: int) -> _I64:
    """The row of each piece [p]: longest first (earliest first among equals), into the row that it fills best."""
    order = np.argsort(-lengths, kind="stable")
    shift = lengths.size.bit_length()
    free: list[int] = []  # (tokens that are free) << shift | row, ascending
    rows = np.empty(lengths.size, dtype=np.int64)
    chosen: list[int] = []
    count = 0
    mask = (1 << shift) - 1
    for length in lengths[order].tolist():
        at = bisect_left(free, length << shift)
        if at < len(free):
            found = free.pop(at)
            row, left = found & mask, (found >> shift) - length
        else:
            row, left = count, capacity - length
            count += 1
        if left:
            insort(free, left << shift | row)
        chosen.append(row)
    rows[order] = chosen
    return rows
