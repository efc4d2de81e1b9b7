"""The rows of a step as people read them: where each comes from, its text, and which of it counts.

Owns the way from a step to text. Reads the shards themselves, past any service. Refuses to print.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_service.cache import ShardCache
from data_service.errors import ConfigError
from data_service.manifest import DatasetManifest, tokenizer_uri
from data_service.order import rows_of_batches, shards_of
from data_service.plan import Plan, part_of_rows
from data_service.rows import ShardRows
from data_service.schema import NO_LABEL, RowBlock
from data_service.shards import ShardIndex, shard_file
from data_service.tokenizer import load_encoder

__all__ = ["ShownRow", "TextPiece", "rows_of_step"]

_TOKENS_AT_ONCE = 2**22


@dataclass(frozen=True)
class TextPiece:
    """Tokens of one document that follow each other and count alike."""

    first: int
    """Place of the first token in the row."""
    text: str
    starts_document: bool
    counts: bool
    """Whether the tokens count as labels. The row's first token is shown with those behind it: it is no label."""


@dataclass(frozen=True)
class ShownRow:
    """One row; field names are those of `stormjib data show --json`."""

    slot: int
    row_id: int
    source: str
    generation: int
    shard: str
    """Its file in the dataset."""
    row: int
    """Its number among the rows that one preparation wrote of the source."""
    length: int
    """Tokens, padding left out."""
    num_labels: int
    """Labels that count."""
    document_starts: tuple[int, ...]
    label: str | None
    """Its class, where it has one."""
    crc: int
    pieces: tuple[TextPiece, ...]

    @property
    def text(self) -> str:
        """The whole row."""
        return "".join(piece.text for piece in self.pieces)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "text": self.text}


def rows_of_step(
    dataset_uri: str, manifest: DatasetManifest, plan: Plan, step: int, slots: tuple[int, int] | None = None
) -> Iterator[ShownRow]:
    """The rows of a step, in global order, read from the shards.

    Args:
        dataset_uri: the prepared dataset.
        manifest: the generation of it that the plan is of.
        plan: of a split.
        step: its index, from 0.
        slots: the first slot and the one behind the last, by default all.

    Raises:
        ConfigError: when the tokenizer is gone.
        ShardCorruptError: when a shard is damaged.
    """
    chosen = rows_of_batches(plan, step, step + 1, slots)
    parts, shards = shards_of(plan, chosen.row_id)
    first_shard = {(one.source, one.generation): one.first_shard for one in manifest.splits[plan.split]}
    try:
        tokenizer = load_encoder(tokenizer_uri(dataset_uri), manifest.tokenizer_digest)
    except FileNotFoundError as error:
        raise ConfigError(
            f"the text of rows was asked for, {tokenizer_uri(dataset_uri)} holds no tokenizer.json. Prepare the "
            "dataset again, which restores it."
        ) from error
    at_once = max(1, _TOKENS_AT_ONCE // (plan.seq_len + 1))
    with closing(ShardCache(dataset_uri)) as cache:
        reader = ShardRows(manifest, ShardIndex(dataset_uri, manifest), cache)
        for begin in range(0, chosen.row_id.size, at_once):
            block = reader.read(plan, chosen.row_id[begin : begin + at_once])
            for index in range(block.row_id.size):
                place = begin + index
                part = plan.parts[int(parts[place])]
                number = first_shard[part.source, part.generation] + int(shards[place])
                starts = block.starts[block.start_offsets[index] : block.start_offsets[index + 1]]
                counting = _counting(plan, block, index, starts)
                class_number = NO_LABEL if block.labels is None else block.labels[index]
                yield ShownRow(
                    slot=int(chosen.slot[place]),
                    row_id=int(block.row_id[index]),
                    source=part.source,
                    generation=part.generation,
                    shard=shard_file(plan.split, number),
                    row=part_of_rows(int(block.row_id[index]))[1],
                    length=int(block.length[index]),
                    num_labels=int(counting[1:].sum()),
                    document_starts=tuple(starts.tolist()),
                    label=None if class_number == NO_LABEL else manifest.labels[int(class_number)],
                    crc=int(block.row_crc[index]),
                    pieces=_pieces(tokenizer, block.tokens[index, : block.length[index]], starts, counting),
                )


def _counting(plan: Plan, block: RowBlock, index: int, starts: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Which tokens of a row count as labels [length]; the first, which is none, goes with the second."""
    length = int(block.length[index])
    counting = np.ones(length, dtype=np.bool_)
    if block.answer_bits is not None:
        bits = np.unpackbits(block.answer_bits[index], count=plan.seq_len, bitorder="little").view(np.bool_)
        counting[1:] = bits[: length - 1]
    if plan.isolate_documents:
        counting[starts[starts > 0]] = False
    counting[0] = counting[1] if length > 1 else False
    return counting


def _pieces(
    tokenizer: Tokenizer,
    tokens: npt.NDArray[np.unsignedinteger],
    starts: npt.NDArray[np.uint32],
    counting: npt.NDArray[np.bool_],
) -> tuple[TextPiece, ...]:
    """The row's text, cut where a document begins and where masked and counted tokens meet."""
    is_start = np.zeros(tokens.size, dtype=np.bool_)
    is_start[starts] = True
    cuts = is_start.copy()
    cuts[0] = True
    # A document's masked first token stays with the document.
    changes = np.diff(counting, prepend=counting[:1])
    cuts |= changes & ~np.concatenate([[False], is_start[:-1]])
    begins = np.flatnonzero(cuts)
    pieces = []
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), tokens.size], strict=True):
        text = tokenizer.decode(tokens[begin:end].tolist(), skip_special_tokens=False)
        counts = bool(counting[min(begin + 1, end - 1)]) if is_start[begin] else bool(counting[begin])
        pieces.append(TextPiece(begin, text, bool(is_start[begin]), counts))
    return tuple(pieces)
