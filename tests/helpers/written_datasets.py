"""Prepared datasets without a preparation: random documents written as shards, and their rows cut independently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_service.config import RowKind
from data_service.hashing import sample_hash
from data_service.manifest import DATASET_VERSION, SPLITS, DatasetManifest, PartInfo, manifest_name
from data_service.order import rows_of_batch
from data_service.plan import Plan, part_of_rows
from data_service.shards import Shard, ShardEntry, checksum, encode_shard, index_pages, shard_file
from tests.helpers.plans import slow_crc32c

EOS = 0


@dataclass(frozen=True)
class WrittenPart:
    """One source's documents of one generation in one split; each ends with EOS."""

    source: str
    documents: Sequence[np.ndarray]
    generation: int = 0
    labels: Sequence[int] = ()
    """Class of each document (document rows)."""
    answers: Sequence[np.ndarray] = ()
    """bool per token of each document (document rows with loss masks)."""

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.concatenate(list(self.documents))

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *[one.size for one in self.documents[:-1]]]).astype(np.uint32)


@dataclass(frozen=True)
class Row:
    """A row as it must arrive."""

    tokens: np.ndarray
    length: int
    starts: np.ndarray
    answer_bits: bytes = b""
    label: int | None = None

    @property
    def crc(self) -> int:
        data = self.length.to_bytes(4, "little") + self.tokens.tobytes() + self.starts.astype("<u4").tobytes()
        data += self.answer_bits + (b"" if self.label is None else int(self.label).to_bytes(4, "little", signed=True))
        return slow_crc32c(data)


def random_documents(seed: int, num_tokens: int, vocab: int = 500, longest: int = 90, dtype: str = "uint16") -> list:
    """Documents of 2 … `longest` random tokens and about `num_tokens` in all; every one ends with EOS."""
    draw = np.random.default_rng(seed)
    found, left = [], num_tokens
    while left > 0:
        size = min(int(draw.integers(2, longest + 1)), max(2, left))
        document = draw.integers(1, vocab, size).astype(dtype)
        document[-1] = EOS
        found.append(document)
        left -= size
    return found


def packed_shard(draw: np.random.Generator, num_rows: int, width: int) -> Shard:
    """Rows of 2 … `width` random tokens with answer bits; they may begin inside a document."""
    lengths = draw.integers(2, width + 1, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    total = int(offsets[-1])
    starts = np.flatnonzero(draw.random(total) < 0.1).astype(np.uint32)
    return Shard(
        draw.integers(1, 500, total).astype(np.uint16),
        starts,
        offsets,
        np.packbits(draw.random(total) < 0.5, bitorder="little"),
    )


@dataclass(frozen=True)
class WrittenDataset:
    """A dataset on disk, and what was put into it."""

    uri: str
    manifest: DatasetManifest
    parts: Mapping[str, Sequence[WrittenPart]]

    def row(self, plan: Plan, row_id: int) -> Row:
        """A row, cut from the documents and not from the shards."""
        number, place = part_of_rows(row_id)
        wanted = plan.parts[number]
        part = next(
            one for one in self.parts[plan.split] if (one.source, one.generation) == (wanted.source, wanted.generation)
        )
        width = plan.seq_len + 1
        tokens = np.full(width, EOS, dtype=self.manifest.dtype)
        if self.manifest.rows == "document":
            document = part.documents[place]
            tokens[: document.size] = document
            bits = b""
            if self.manifest.loss_masks:
                answers = np.zeros(plan.seq_len, dtype=np.bool_)
                answers[: document.size - 1] = part.answers[place][1:]
                bits = np.packbits(answers, bitorder="little").tobytes()
            label = part.labels[place] if self.manifest.labels else None
            return Row(tokens, document.size, np.zeros(1, np.uint32), bits, label)
        shard, row = divmod(place, wanted.rows_per_shard)
        size = self.manifest.shard_tokens
        begin = shard * size + row * plan.seq_len
        cut = part.tokens[begin : min(begin + width, (shard + 1) * size + 1)]
        tokens[: cut.size] = cut
        starts = part.starts[(part.starts >= begin) & (part.starts < begin + cut.size)] - begin
        return Row(tokens, cut.size, starts)

    def hash_of_step(self, plan: Plan, step: int) -> str:
        """The sample hash that ranks must find."""
        ids = rows_of_batch(plan, step)
        crcs = [self.row(plan, row_id).crc for row_id in ids.tolist()]
        return sample_hash(ids, np.array(crcs, dtype=np.uint32))


def write_dataset(
    folder: Path,
    parts: Mapping[str, Sequence[WrittenPart]],
    *,
    rows: RowKind = "stream",
    seq_len: int = 0,
    shard_tokens: int = 2048,
    shard_rows: int = 16,
    labels: tuple[str, ...] = (),
    loss_masks: bool = False,
) -> WrittenDataset:
    """Write a dataset.

    Args:
        folder: where to.
        parts: split -> parts in the order of (generation, source).
        rows: stream or document.
        seq_len: of document rows.
        shard_tokens: of stream shards.
        shard_rows: of document shards.
        labels: classes, where documents have them.
        loss_masks: whether documents have `answers`.
    """
    (folder / "shards").mkdir(parents=True)
    entries: list[ShardEntry] = []
    infos: dict[str, tuple[PartInfo, ...]] = {}
    for split in SPLITS:
        found: list[PartInfo] = []
        number = 0
        for part in parts.get(split, ()):
            shards = _stream_shards(part, shard_tokens) if rows == "stream" else _document_shards(part, shard_rows)
            first = number
            for shard, num_tokens, num_rows in shards:
                data = encode_shard(shard)
                (folder / shard_file(split, number)).write_bytes(data)
                entries.append(ShardEntry(split, number, num_tokens, num_rows, len(data), checksum(data)))
                number += 1
            found.append(
                PartInfo(
                    part.source,
                    part.generation,
                    len(part.documents),
                    int(part.tokens.size),
                    0 if rows == "stream" else len(part.documents),
                    first,
                    number - first,
                )
            )
        infos[split] = tuple(found)
    pages = index_pages(entries)
    for page, data in enumerate(pages):
        (folder / "shards" / f"index-{page:05d}.arrow").write_bytes(data)
    every = [part for split in SPLITS for part in parts.get(split, ())]
    dtype = every[0].documents[0].dtype
    manifest = DatasetManifest(
        version=DATASET_VERSION,
        digest=checksum(b"".join(entry.checksum for entry in entries)).hex(),
        generation=0,
        rows=rows,
        row_tokens=0 if rows == "stream" else seq_len + 1,
        shard_tokens=shard_tokens,
        shard_rows=0 if rows == "stream" else shard_rows,
        vocab_size=int(max(part.tokens.max() for part in every)) + 1,
        token_dtype="uint16" if dtype == np.uint16 else "uint32",
        eos_id=EOS,
        labels=labels,
        loss_masks=loss_masks,
        splits=infos,
        num_shards=len(entries),
        index_digests=tuple(checksum(page).hex() for page in pages),
        tokenizer_digest="none",
        eval_below=0,
        prepare_key="written by a test",
        inputs={},
        files=(),
        num_records=sum(len(part.documents) for part in every),
        num_rejects=0,
        num_duplicates=0,
        num_truncated=0,
    )
    (folder / manifest_name(0)).write_text(manifest.to_json())
    return WrittenDataset(str(folder), manifest, parts)


def _stream_shards(part: WrittenPart, shard_tokens: int) -> list[tuple[Shard, int, int]]:
    tokens, starts = part.tokens, part.starts
    found = []
    for begin in range(0, tokens.size, shard_tokens):
        stored = tokens[begin : begin + shard_tokens + 1]
        inside = starts[(starts >= begin) & (starts < begin + stored.size)] - np.uint32(begin)
        found.append((Shard(stored, inside), min(shard_tokens, stored.size), 0))
    return found


def _document_shards(part: WrittenPart, shard_rows: int) -> list[tuple[Shard, int, int]]:
    found = []
    for begin in range(0, len(part.documents), shard_rows):
        rows = slice(begin, begin + shard_rows)
        documents = list(part.documents[rows])
        offsets = np.cumsum([0, *[one.size for one in documents]]).astype(np.uint64)
        bits = None
        if part.answers:
            bits = np.packbits(np.concatenate(list(part.answers[rows])), bitorder="little")
        shard = Shard(
            np.concatenate(documents),
            offsets[:-1].astype(np.uint32),
            offsets,
            bits,
            np.array(part.labels[rows], dtype=np.int32) if len(part.labels) else None,
        )
        found.append((shard, int(offsets[-1]), len(documents)))
    return found


def stream_dataset(
    folder: Path,
    *,
    tokens: Sequence[int] = (9000, 4000),
    eval_tokens: int = 1500,
    shard_tokens: int = 2048,
    seed: int = 1,
) -> WrittenDataset:
    """A stream dataset of one source for each size in `tokens`, several shards each, and one of eval rows."""
    train = [
        WrittenPart(f"source{number}", random_documents(seed * 100 + number, size))
        for number, size in enumerate(tokens)
    ]
    held_out = [WrittenPart("source0", random_documents(seed * 100 + 99, eval_tokens))]
    return write_dataset(folder, {"train": train, "eval": held_out}, shard_tokens=shard_tokens)
