"""What is in the shards, against a reference that concatenates and cuts lists by hand."""

import json
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_service.chat import ChatRenderer
from data_service.config import DataConfig, SourceConfig
from data_service.counts import read_counts
from data_service.encode import EncodedDocuments
from data_service.errors import ConfigError
from data_service.manifest import SPLITS, DatasetManifest, read_manifest
from data_service.prepare import prepare
from data_service.shard_writer import cut_stream
from data_service.shards import Shard, ShardIndex, load_shard
from data_service.stages import Sizes
from data_service.tokenizer import read_tokenizer
from tests.helpers.data_runs import reviews, small_config

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TEXTS = reviews(300)


@pytest.fixture(autouse=True)
def small_items(monkeypatch):
    """Many chunks and runs, so that their borders fall everywhere."""
    monkeypatch.setattr("data_service.prepare._SIZES", Sizes(4096, 50, 60))


def write_sources(folder: Path) -> dict[str, Path]:
    """Plain text, labelled text and chats; long ones and duplicates among them."""
    long_text = "".join(TEXTS[200:260])
    plain = [*TEXTS[:90], long_text, *TEXTS[:5]]
    (folder / "plain.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in plain))
    labelled = [{"text": text, "label": f"class {number % 3}"} for number, text in enumerate(TEXTS[90:150])]
    labelled.append({"text": "".join(TEXTS[260:290]), "label": "class 1"})
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    chats = []
    for question, answer in zip(TEXTS[150:170], TEXTS[170:190], strict=True):
        chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}] * 2)
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in [*chats, chats[3]]))
    (folder / "chat.jinja").write_text(TEMPLATE)
    return {name: folder / f"{name}.jsonl" for name in ("plain", "labelled", "chats")}


def config_of(folder: Path, rows: str, *names: str, seq_len: int = 40) -> DataConfig:
    paths = write_sources(folder)
    extra = {"plain": {}, "labelled": {"label": "label"}, "chats": {"messages": "messages"}}
    sources = tuple(SourceConfig(name=name, path=str(paths[name]), **extra[name]) for name in names)
    update = {"sources": sources, "rows": rows, "chat_template": str(folder / "chat.jinja")}
    return small_config(paths["plain"], seq_len=seq_len).model_copy(update=update)


def shards_of(dataset: Path, manifest: DatasetManifest, split: str, source: str) -> list[Shard]:
    """The shards of a source, which lie together."""
    index = ShardIndex(str(dataset), manifest)
    return [
        load_shard(str(dataset), index.entry(split, number))
        for part in manifest.splits[split]
        if part.source == source
        for number in range(part.first_shard, part.first_shard + part.num_shards)
    ]


def reference(dataset: Path, config: DataConfig, name: str) -> dict[str, list[tuple[list[int], list[bool], int]]]:
    """Split → a source's documents, first of each text, as (tokens, which count, class number)."""
    manifest = read_manifest(str(dataset))
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    renderer = ChatRenderer(read_tokenizer(str(dataset / "tokenizer"))) if name == "chats" else None
    source = next(one for one in config.sources if one.name == name)
    seen = set()
    found: dict[str, list[tuple[list[int], list[bool], int]]] = {"train": [], "eval": []}
    for line in Path(source.path).read_text().splitlines():
        record = json.loads(line)
        label = -1
        if renderer is not None:
            text = json.dumps(record["messages"], ensure_ascii=False, separators=(",", ":"))
            tokens, counts = renderer.encode(record["messages"])
        else:
            text = record["text"]
            tokens = [*tokenizer.encode(text, add_special_tokens=False).ids, manifest.eos_id]
            counts = [True] * len(tokens)
            if manifest.labels and "label" in record:
                label = manifest.labels.index(record["label"])
        if text in seen:
            continue
        seen.add(text)
        if not any(counts[1 : config.seq_len + 1]):
            continue
        value = int.from_bytes(blake2b(text.encode(), digest_size=16).digest()[:8], "little")
        found["eval" if value < manifest.eval_below else "train"].append((tokens, counts, label))
    return found


def test_stream_shards_are_windows_over_the_documents_of_each_source(tmp_path):
    config = config_of(tmp_path, "stream", "labelled", "plain")
    manifest = prepare(config, str(tmp_path / "d"))
    assert [part.source for part in manifest.splits["train"]] == ["labelled", "plain"]
    assert not manifest.labels
    for name in ("labelled", "plain"):
        for split, documents in reference(tmp_path / "d", config, name).items():
            tokens = [token for document, _, _ in documents for token in document]
            starts, place = [], 0
            for document, _, _ in documents:
                starts.append(place)
                place += len(document)
            (part,) = [part for part in manifest.splits[split] if part.source == name]
            assert (part.num_documents, part.num_tokens) == (len(documents), len(tokens))
            shards = shards_of(tmp_path / "d", manifest, split, name)
            size = config.shard_tokens
            assert len(shards) == -(-len(tokens) // size)
            for number, shard in enumerate(shards):
                assert shard.tokens.tolist() == tokens[number * size : (number + 1) * size + 1]
                inside = [one - number * size for one in starts if 0 <= one - number * size < shard.tokens.size]
                assert shard.starts.tolist() == inside
                assert shard.row_offsets is shard.answer_bits is shard.labels is None


@pytest.mark.parametrize("extra", [0, 1, 2, 100])
def test_the_last_shard_may_hold_a_single_token(tmp_path, extra):
    """A part of k · shard_tokens + extra tokens has k shards, and one more when extra is above 0."""
    tokens = np.arange(3 * 1024 + extra, dtype=np.uint16)
    lengths = np.diff([0, 500, 1024, 1025, 2048, 2500, tokens.size]).astype(np.uint32)
    ends = np.cumsum(lengths)
    cuts = [0, 2, 3, 6]
    parts = [
        EncodedDocuments(tokens[(ends[a - 1] if a else 0) : ends[b - 1]], lengths[a:b], None, None)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    shards = list(cut_stream(iter(parts), 1024))
    assert [count for _, count in shards] == [1024] * 3 + [extra] * bool(extra)
    assert [shard.tokens.tolist() for shard, _ in shards] == [
        tokens[begin : begin + 1025].tolist() for begin in range(0, tokens.size, 1024)
    ]
    starts = [0, 500, 1024, 1025, 2048, 2500]
    for number, (shard, _) in enumerate(shards):
        here = [one - number * 1024 for one in starts if 0 <= one - number * 1024 < shard.tokens.size]
        assert shard.starts.tolist() == here


def rows_of(shards: list[Shard]) -> list[tuple[list[int], list[bool] | None, list[int], int | None]]:
    """Rows as (tokens, which count, starts, class)."""
    rows = []
    for shard in shards:
        counts = None
        if shard.answer_bits is not None:
            counts = np.unpackbits(shard.answer_bits, count=shard.tokens.size, bitorder="little").astype(bool)
        offsets = shard.row_offsets.tolist()
        for row, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            starts = [one - begin for one in shard.starts.tolist() if begin <= one < end]
            rows.append(
                (
                    shard.tokens[begin:end].tolist(),
                    None if counts is None else counts[begin:end].tolist(),
                    starts,
                    None if shard.labels is None else int(shard.labels[row]),
                )
            )
    return rows


def pieces_of(
    documents: list[tuple[list[int], list[bool], int]], row_tokens: int, *, truncate: bool
) -> list[tuple[list[int], list[bool], bool, int]]:
    """Documents cut by hand: (tokens, which count, begins a document, class)."""
    pieces = []
    for tokens, counts, label in documents:
        if truncate or len(tokens) <= row_tokens:
            pieces.append((tokens[:row_tokens], counts[:row_tokens], True, label))
            continue
        begin = 0
        while begin < len(tokens) - 1:
            pieces.append((tokens[begin : begin + row_tokens], counts[begin : begin + row_tokens], begin == 0, label))
            begin += row_tokens - 1
    return pieces


def test_document_rows_hold_one_document_or_a_piece_of_one(tmp_path):
    config = config_of(tmp_path, "document", "plain", "labelled", "chats")
    manifest = prepare(config, str(tmp_path / "d"))
    assert manifest.labels == ("class 0", "class 1", "class 2")
    assert manifest.loss_masks
    assert manifest.row_tokens == 41
    assert manifest.shard_rows == 2048 // 41
    truncated = 0
    for name in ("plain", "labelled", "chats"):
        for split, documents in reference(tmp_path / "d", config, name).items():
            pieces = pieces_of(documents, 41, truncate=name != "plain")
            truncated += sum(len(tokens) > 41 for tokens, _, _ in documents) * (name != "plain")
            parts = [part for part in manifest.splits[split] if part.source == name]
            found = [(part.num_documents, part.num_rows) for part in parts]
            assert found == ([(len(documents), len(pieces))] if documents else [])
            shards = shards_of(tmp_path / "d", manifest, split, name)
            assert {shard.row_offsets.size - 1 for shard in shards[:-1]} <= {manifest.shard_rows}
            assert rows_of(shards) == [
                (tokens, counts, [0] if begins else [], label) for tokens, counts, begins, label in pieces
            ]
    assert manifest.num_truncated == truncated > 10
    assert sum(one.num_truncated for one in read_counts(str(tmp_path / "d"), 0)) == truncated
    (counts,) = [one for one in read_counts(str(tmp_path / "d"), 0) if one.source == "labelled"]
    labelled = reference(tmp_path / "d", config, "labelled")
    classes = Counter(manifest.labels[label] for split in SPLITS for _, _, label in labelled[split])
    assert Counter(counts.labels["train"]) + Counter(counts.labels["eval"]) == classes


def test_packed_rows_hold_every_piece_once(tmp_path):
    config = config_of(tmp_path, "packed", "plain", "chats", seq_len=100)
    manifest = prepare(config, str(tmp_path / "d"))
    assert not manifest.labels
    for name in ("plain", "chats"):
        for split, documents in reference(tmp_path / "d", config, name).items():
            pieces = pieces_of(documents, 101, truncate=name == "chats")
            rows = rows_of(shards_of(tmp_path / "d", manifest, split, name))
            found = Counter()
            for tokens, counts, starts, _ in rows:
                assert 0 < len(tokens) <= 101
                cuts = sorted({0, *starts, len(tokens)})
                for begin, end in zip(cuts, cuts[1:], strict=False):
                    found[tuple(tokens[begin:end]), tuple(counts[begin:end])] += 1
            assert found == Counter((tuple(tokens), tuple(counts)) for tokens, counts, _, _ in pieces)
            assert name == "chats" or len(rows) < len(pieces)


def test_lengths_are_counted_as_they_are(tmp_path):
    config = config_of(tmp_path, "document", "plain", "labelled")
    prepare(config, str(tmp_path / "d"))
    for one in read_counts(str(tmp_path / "d"), 0):
        for split, documents in reference(tmp_path / "d", config, one.source).items():
            lengths = [len(tokens) for tokens, _, _ in documents]
            counted = one.splits[split]
            assert (counted.documents, counted.tokens) == (len(lengths), sum(lengths))
            below = sorted(counted.lengths)
            expected = Counter(max(least for least in below if least <= length) for length in lengths)
            assert expected == Counter(counted.lengths)
            assert all(length - max(least for least in below if least <= length) <= length / 32 for length in lengths)


def test_a_class_column_of_numbers_keeps_their_order_and_chats_need_a_template(tmp_path):
    rows = [f"{text}\t{number % 11 - 1}" for number, text in enumerate(TEXTS[:60])]
    (tmp_path / "n.tsv").write_text("\n".join(["text\tstars", *rows]))
    config = config_of(tmp_path, "document", "plain")
    numbered = config.model_copy(update={"sources": (SourceConfig(path=str(tmp_path / "n.tsv"), label="stars"),)})
    assert prepare(numbered, str(tmp_path / "n")).labels == tuple(str(number) for number in range(-1, 10))
    chats = config_of(tmp_path, "document", "chats").model_copy(update={"chat_template": None})
    with pytest.raises(ConfigError, match=r"data\.chat_template to a Jinja file"):
        prepare(chats, str(tmp_path / "c"))


def test_chats_cannot_be_added_where_shards_hold_no_masks(tmp_path):
    prepare(config_of(tmp_path, "document", "plain"), str(tmp_path / "d"))
    with pytest.raises(ConfigError, match=r"data\.chat_template|do not tell which tokens count"):
        prepare(config_of(tmp_path, "document", "plain", "chats"), str(tmp_path / "d"))
