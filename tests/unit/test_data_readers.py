"""Source files of every format, plain and compressed: the same records, each reject with its place, bounded memory."""

import errno
import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from data_service import storage
from data_service.config import SourceConfig
from data_service.errors import DataUnavailableError, SourceError
from data_service.readers import Message, Record, Reject, SourceFile, find_files, fingerprint, read_records

LIMIT = 1 << 20
TEXTS = [
    "plain",
    'with "quotes", commas',
    "两行\n中文",
    "tab\there",
    " spaces around ",
    "x" * 5000,
    "e\u0301 ünïcode 🙂",
]
LABELS = ["0", "1", "neg", "pos", "类", "0", "1"]


def rows(count: int = 300) -> list[tuple[str, str]]:
    return [(f"{number} {TEXTS[number % 7]}", LABELS[number % 7]) for number in range(count)]


def write_csv(path: Path, delimiter: str) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '",\n\t') else text

    lines = [f"label{delimiter}text", *(f"{label}{delimiter}{quoted(text)}" for text, label in rows())]
    path.write_bytes("\n".join(lines).encode() + b"\n")


def table() -> pa.Table:
    texts, labels = zip(*rows(), strict=True)
    return pa.table({"other": list(range(len(texts))), "label": list(labels), "text": list(texts)})


def write_arrow(path: Path, kind: str) -> None:
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with path.open("wb") as file, new(file, table().schema) as writer:
        writer.write_table(table(), max_chunksize=70)


def write(path: Path) -> Path:
    """All rows, in the format that the name says."""
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    kind = plain.suffix
    if kind in (".csv", ".tsv"):
        write_csv(plain, "," if kind == ".csv" else "\t")
    elif kind in (".jsonl", ".ndjson"):
        plain.write_text("".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in rows()))
    elif kind == ".parquet":
        pa.parquet.write_table(table(), plain, row_group_size=110)
    elif kind == ".feather":
        pa.feather.write_feather(table(), plain, compression="lz4", chunksize=90)
    elif kind == ".arrow":
        write_arrow(plain, "file" if "file" in plain.stem else "stream")
    elif kind == ".txt":
        plain.write_text("".join(text.replace("\n", " ") + "\n" for text, _ in rows()))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(plain.read_bytes())
    if path != plain:
        plain.unlink()
    return path


def source(path: object, **settings: object) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **settings})


def only(path: object, **settings: object) -> SourceFile:
    (file,) = find_files((source(path, **settings),))
    return file


def records(file: SourceFile, limit: int = LIMIT) -> list[Record | Reject]:
    return list(read_records(file, limit))


@pytest.mark.parametrize(
    "name",
    [
        *(f"a.{kind}{end}" for kind in ("csv", "tsv", "jsonl", "ndjson", "txt") for end in ("", ".gz", ".zst")),
        "a.parquet",
        "a.feather",
        "file.arrow",
        "stream.arrow",
    ],
)
def test_every_format_gives_the_same_records(tmp_path, name):
    path = write(tmp_path / name)
    if name.startswith("a.txt"):
        assert records(only(path)) == [
            Record(number, text.replace("\n", " ")) for number, (text, _) in enumerate(rows(), 1)
        ]
        return
    found = records(only(path, label="label"))
    assert [(record.text, record.label) for record in found] == rows()
    assert [record.messages for record in found] == [None] * len(found)
    lines = [record.line for record in found]
    if ".csv" in name or ".tsv" in name:
        ends = [1 + text.count("\n") for text, _ in rows()]
        assert lines == [2 + sum(ends[:number]) for number in range(len(ends))]
    else:
        assert lines == list(range(1, len(lines) + 1))
    assert [record.label for record in records(only(path))] == [None] * len(found)


CHAT = [{"role": "user", "content": '你好 "you"'}, {"role": "assistant", "content": "Hello"}]
BAD_CHATS = [
    ([], "an empty list"),
    ([{"role": "user", "content": "no answer"}], "the assistant says nothing"),
    ([{"role": "assistant", "content": "  "}], "the assistant says nothing"),
    ([{"role": "user"}, *CHAT], "message 0 has no content"),
    ([{"content": "x"}, *CHAT], "message 0 has no role"),
    ([*CHAT, {"role": "assistant", "content": None}], "message 2 has a content of type NoneType"),
    ([*CHAT, {"role": "assistant", "content": ["parts"]}], "message 2 has a content of type list"),
    ([*CHAT, {"role": 3, "content": "x"}], "message 2 has a role of type int"),
    ([*CHAT, {"role": " ", "content": "x"}], "message 2 has an empty role"),
    ([*CHAT, "text"], "message 2 is str"),
    ([*CHAT, {"role": "user", "content": "a\0b"}], "NUL character: in the content of message 2"),
    ([*CHAT, {"role": "user", "content": "\ud800"}], "invalid UTF-8: a lone surrogate in the content of message 2"),
    ({"role": "user"}, "dict, not a list"),
    (None, "NoneType, not a list"),
]


def test_chats_are_checked_and_come_with_their_canonical_text(tmp_path):
    path = tmp_path / "chats.jsonl"
    extra = [{**CHAT[0], "name": "left out"}, CHAT[1]]
    lines = [CHAT, extra, *(chat for chat, _ in BAD_CHATS), json.dumps(CHAT)]
    path.write_text("".join(json.dumps({"chat": chat, "kind": 7}) + "\n" for chat in lines))
    found = records(only(path, messages="chat", label="kind"))
    messages = (Message("user", '你好 "you"'), Message("assistant", "Hello"))
    text = '[{"role":"user","content":"你好 \\"you\\""},{"role":"assistant","content":"Hello"}]'
    assert found[:2] == [Record(1, text, "7", messages), Record(2, text, "7", messages)]
    assert found[-1] == Record(len(lines), text, "7", messages)
    for number, (_, reason) in enumerate(BAD_CHATS):
        reject = found[2 + number]
        assert isinstance(reject, Reject)
        assert reject.line == 3 + number
        assert reason in reject.reason, reject
    assert all(isinstance(one, Reject) for one in records(only(path, messages="chat"), limit=20))


def test_chats_in_columns_and_in_cells(tmp_path):
    texts = [record.text for record in (Record(1, json.dumps(CHAT, ensure_ascii=False, separators=(",", ":"))),)]
    pa.parquet.write_table(pa.table({"messages": [CHAT, None, CHAT[:1]], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "b.arrow", pa.schema({"messages": pa.string()})) as writer:
        writer.write_table(pa.table({"messages": [json.dumps(CHAT), None, "not JSON"]}))
    cell = json.dumps(CHAT).replace('"', '""')
    (tmp_path / "c.csv").write_text(f'n,messages\n1,"{cell}"\n2,\n3,nothing\n')
    for name in ("a.parquet", "b.arrow", "c.csv"):
        first, *rest = records(only(tmp_path / name, messages="messages"))
        assert first.messages == (Message("user", '你好 "you"'), Message("assistant", "Hello"))
        assert first.text == texts[0]
        assert [one.reason.partition(":")[0] for one in rest] == ["bad messages"] * 2


def test_labels_are_text_and_a_record_without_one_is_rejected(tmp_path):
    path = tmp_path / "a.jsonl"
    labels = [" pos ", 3, True, False, None, "", "  ", 1.5, ["x"], "a\0", 2**70]
    lines = [json.dumps({"text": "t", "y": label}) for label in labels] + ['{"text": "t"}', '{"y": "only"}']
    path.write_text("\n".join(lines))
    found = records(only(path, label="y"))
    assert [one.label for one in found if isinstance(one, Record)] == ["pos", "3", "true", "false", str(2**70)]
    assert [(one.line, one.reason.partition(":")[0]) for one in found if isinstance(one, Reject)] == [
        (5, "no label"),
        (6, "no label"),
        (7, "no label"),
        (8, "bad label"),
        (9, "bad label"),
        (10, "NUL character"),
        (12, "no key 'y'"),
        (13, "no key 'text'"),
    ]
    columns = pa.table({"text": ["a", "b", "c"], "y": pa.array([1, None, 3], pa.int8())})
    pa.parquet.write_table(columns, tmp_path / "a.parquet")
    found = records(only(tmp_path / "a.parquet", label="y"))
    assert found == [Record(1, "a", "1"), Reject(2, "no label"), Record(3, "c", "3")]


def test_bad_lines_of_json_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = b"[" * 100_000
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        b"",
        b"not json",
        b"[1]",
        b'{"text": 5}',
        b'{"other": "x"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "a\\u0000b"}',
        b'{"text": "  "}',
        deep,
        b'{"text": ' + b"9" * 10_000 + b"}",
        b'{"text": "' + b"y" * LIMIT + b'"}',
        b'{"text": "last"}\r',
        b'{"text": "cut off',
    ]
    path.write_bytes(b"\n".join(lines))
    found = records(only(path))
    assert [one for one in found if isinstance(one, Record)] == [Record(1, "first"), Record(14, "last")]
    assert [(one.line, one.reason.partition(":")[0]) for one in found if isinstance(one, Reject)] == [
        (3, "not JSON"),
        (4, "not a JSON object"),
        (5, "bad text"),
        (6, "no key 'text'"),
        (7, "invalid UTF-8"),
        (8, "invalid UTF-8"),
        (9, "NUL character"),
        (10, "empty text"),
        (11, "not JSON"),
        (12, "not JSON"),
        (13, "over-long"),
        (15, "not JSON"),
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_strings_that_are_no_text_cost_their_own_row(tmp_path, name):
    raw = [b"good", b"bad \xff\xfe", None, b"nul \0", b"  ", b"y" * (LIMIT + 1), b"last"]
    column = pa.array(raw, pa.binary()).view(pa.string())
    whole = pa.table({"text": column})
    if name == "a.parquet":
        pa.parquet.write_table(whole, tmp_path / name)
    else:
        with pa.ipc.new_file(tmp_path / name, whole.schema) as writer:
            writer.write_table(whole)
    found = records(only(tmp_path / name))
    assert [one for one in found if isinstance(one, Record)] == [Record(1, "good"), Record(7, "last")]
    assert [(one.line, one.reason.partition(":")[0]) for one in found if isinstance(one, Reject)] == [
        (2, "invalid UTF-8"),
        (3, "empty text"),
        (4, "NUL character"),
        (5, "empty text"),
        (6, "over-long"),
    ]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
)
def test_every_type_of_string_column_is_text(tmp_path, kind):
    column = (
        pa.array(["a", "b", None, "a"]).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.DictionaryArray.from_arrays(
            pa.array([0, 1, None, 0], kind.index_type), pa.array(["a", "b"], kind.value_type)
        )
    )
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": kind})) as writer:
        writer.write_table(pa.table({"text": column}))
    expected = [Record(1, "a"), Record(2, "b"), Reject(3, "empty text"), Record(4, "a")]
    assert records(only(tmp_path / "a.arrow")) == expected


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.feather"])
def test_missing_columns_are_named_with_their_key(tmp_path, name):
    path = write(tmp_path / name)
    with pytest.raises(SourceError, match=r"data\.sources\.0\.text=body .* not among the columns .*'label'"):
        records(only(path, text="body"))
    with pytest.raises(SourceError, match=r"data\.sources\.0\.label=class .* not among"):
        records(only(path, label="class"))
    with pytest.raises(SourceError, match=r"data\.sources\.1\.messages=chat .* not among"):
        records(find_files((source(write(tmp_path / "first.txt")), source(path, messages="chat")))[1])


def test_columns_of_other_types_and_repeated_names_are_refused(tmp_path):
    pa.parquet.write_table(pa.table({"text": [1, 2], "chat": [["a"], ["b"]]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"data\.sources\.0\.text=text is a column of int64, not of text"):
        records(only(tmp_path / "a.parquet"))
    with pytest.raises(SourceError, match="messages=chat is a column of list"):
        records(only(tmp_path / "a.parquet", messages="chat"))
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    with pytest.raises(SourceError, match="more than once among the columns"):
        records(only(tmp_path / "b.csv"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "the CSV is empty"),
        ("a.tsv", b"text\tlabel\n", "the TSV holds a header and no records"),
        ("a.csv", b'"text\nx\n', "header cannot be read"),
        ("a.csv", b"\xff\xfftext\nx\n", "header is not UTF-8"),
        ("a.csv", "text,label\nx,y\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.parquet", b"PAR1 nothing PAR1", "not a readable Parquet file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.arrow", b"", "not a readable Arrow file"),
        ("a.arrow", b"ARROW1\0\0 nothing", "not a readable Arrow file"),
        ("a.feather", b"FEA1 old", "Feather version 1"),
        ("a.csv.gz", b"", "as gzip: it is empty"),
        ("a.csv.gz", b"text\nplain\n", "as gzip"),
        ("a.jsonl.zst", b'{"text": "plain"}\n', "as zstd"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=words) as raised:
        records(only(path))
    assert str(path) in str(raised.value)


def _noise() -> str:
    """Lines that do not compress, so that damage lies where it is put."""
    chance = random.Random(7)
    return "".join(f"{number} {chance.getrandbits(4000):x}\n" for number in range(3000))


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999, -1])
def test_a_compressed_file_that_is_cut_off_is_no_shorter_file(tmp_path, codec, keep):
    path = tmp_path / ("a.txt.gz" if codec == "gzip" else "a.txt.zst")
    with pa.CompressedOutputStream(str(path), codec) as out:
        out.write(_noise().encode())
    assert len(records(only(path))) == 3000
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if keep > 0 else -1])
    seen = []
    with pytest.raises(SourceError, match=rf"{path.name} could not be read to its end as {codec}.*compression"):
        seen.extend(read_records(only(path), LIMIT))
    assert len(seen) < 3000


@pytest.mark.parametrize("place", [0.3, 0.9])
def test_a_damaged_gzip_file_is_an_error(tmp_path, place):
    path = tmp_path / "a.txt.gz"
    data = bytearray(gzip.compress(_noise().encode()))
    data[int(len(data) * place)] ^= 0x55
    path.write_bytes(bytes(data))
    with pytest.raises(SourceError, match=r"a\.txt\.gz could not be read"):
        records(only(path))


def test_members_of_gzip_and_frames_of_zstd_are_one_file(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    (tmp_path / "a.txt.zst").write_bytes(
        b"".join(pa.compress(text, "zstd", asbytes=True) for text in (b"one\n", b"two\n"))
    )
    for name in ("a.txt.gz", "a.txt.zst"):
        assert records(only(tmp_path / name)) == [Record(1, "one"), Record(2, "two")]


@pytest.mark.parametrize("mark", ["utf-16", "utf-16-be"])
def test_utf_16_with_its_mark_is_read(tmp_path, mark):
    text = 'text,label\r\n你好,1\r\n"a\r\n🙂",2\r\n\ud800 lone,3\r\nlast,4\r\n'
    data = text.encode(mark, "surrogatepass")
    path = tmp_path / "a.csv"
    path.write_bytes(data if mark == "utf-16" else b"\xfe\xff" + data)
    found = records(only(path))
    assert [(one.line, getattr(one, "text", None)) for one in found] == [
        (2, "你好"),
        (3, "a\r\n🙂"),
        (5, None),
        (6, "last"),
    ]
    path.write_bytes(path.read_bytes()[:-1])  # half a character at the end
    assert [type(one) for one in records(only(path))][:2] == [Record, Record]


def test_line_ends_may_be_mixed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\rtwo\r\nthree\n\n\r\rsix? no, seven\r")
    assert [(one.line, one.text) for one in records(only(path))] == [
        (1, "one"),
        (2, "two"),
        (3, "three"),
        (7, "six? no, seven"),
    ]
    # The first half of a CRLF is the last byte of a block.
    path.write_bytes(b"x" * ((1 << 20) - 1) + b"\r\nnext\n")
    assert [one.line for one in records(only(path))] == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def test_folders_globs_and_hidden_files(tmp_path):
    for name in ("b.csv", "a.csv.gz", "sub/deep/c.jsonl", "sub/d.TXT", "sub/.hidden.csv", ".cache/e.csv", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(path: str, **settings: object) -> list[tuple[str, str, str]]:
        return [
            (os.path.relpath(file.uri, tmp_path), file.format, file.compression)
            for file in find_files((source(path, **settings),))
        ]

    everything = [
        ("a.csv.gz", "csv", "gzip"),
        ("b.csv", "csv", "none"),
        ("sub/d.TXT", "txt", "none"),
        ("sub/deep/c.jsonl", "jsonl", "none"),
    ]
    assert names(f"{tmp_path}") == names(f"{tmp_path}/") == everything
    assert names(f"{tmp_path}", format="csv") == everything[:2]
    assert names(f"{tmp_path}/*.csv*") == everything[:2]
    assert names(f"{tmp_path}/**/*.jsonl") == everything[3:]
    assert names(f"{tmp_path}/*.md", format="txt") == [("notes.md", "txt", "none")]
    assert names(f"{tmp_path}/b.csv", compression="zstd") == [("b.csv", "csv", "zstd")]
    (tmp_path / "odd [1].csv").write_bytes(b"x")
    assert names(f"{tmp_path}/odd [1].csv") == [("odd [1].csv", "csv", "none")]


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("none.csv", {}, "does not exist"),
        ("*.nothing", {}, "no file matches"),
        ("empty", {}, "the folder holds no file that ends with"),
        ("full", {"format": "tsv"}, r"holds no file that ends with \.tsv"),
        ("full/notes.md", {}, r"format of .*notes\.md cannot be told.*Set data\.sources\.0\.format"),
        ("full/a.parquet.gz", {}, "parquet in gzip.*Decompress"),
        ("full/a.txt", {"label": "y"}, r"data\.sources\.0\.label is set .* plain text"),
        ("full/a.txt", {"messages": "m"}, r"data\.sources\.0\.messages is set .* plain text"),
        ("broken.csv", {}, "does not exist"),
    ],
)
def test_paths_that_name_nothing_to_read_are_refused(tmp_path, path, settings, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    for name in ("notes.md", "a.parquet.gz", "a.txt"):
        (tmp_path / "full" / name).write_bytes(b"x")
    (tmp_path / "broken.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(SourceError, match=words) as raised:
        find_files((source(tmp_path / path, **settings),))
    assert f"data.sources.0.path={tmp_path / path}" in str(raised.value)


def test_a_file_that_is_reached_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.csv").write_text("text\nx\n")  # the same content is another file
    assert len(find_files((source(tmp_path / "a.csv"), source(tmp_path / "folder")))) == 2
    with pytest.raises(
        SourceError, match=r"sources\.0\.path=.*a\.csv \(one\) and data\.sources\.1\.path=.*\*\.csv \(two\)"
    ):
        find_files((source(tmp_path / "a.csv", name="one"), source(f"{tmp_path}/*.csv", name="two")))
    (tmp_path / "folder" / "link.csv").symlink_to(tmp_path / "a.csv")
    with pytest.raises(SourceError, match=r"a\.csv, also called .*folder/link\.csv"):
        find_files((source(tmp_path / "a.csv"), source(tmp_path / "folder")))
    os.link(tmp_path / "folder" / "b.csv", tmp_path / "folder" / "c.csv")
    with pytest.raises(SourceError, match=r"data\.sources\.0\.path=.*folder reaches one file twice"):
        find_files((source(tmp_path / "folder"),))


def test_a_fingerprint_follows_the_content(tmp_path):
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (fingerprint(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    storage.write_bytes(f"memory://{tmp_path.name}/a", b"x")
    assert fingerprint(f"memory://{tmp_path.name}/a") == a
    storage.remove_tree(f"memory://{tmp_path.name}")
    with pytest.raises(SourceError, match="gone was to be read"):
        fingerprint(str(tmp_path / "gone"))


# ---------------------------------------------------------------------------------------------------------------------
# Memory

_PEAK = """
import resource, sys
from data_service.config import SourceConfig
from data_service.readers import find_files, read_records
(file,) = find_files((SourceConfig(path=sys.argv[1]),))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kinds = {}
for record in read_records(file, 1 << 20):
    kinds[type(record).__name__] = kinds.get(type(record).__name__, 0) + 1
print(kinds.get("Record", 0), kinds.get("Reject", 0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak(path: Path) -> tuple[int, int, float]:
    """Records, rejects, and MiB by which the memory grew."""
    ended = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    good, bad, kib = ended.stdout.split()
    return int(good), int(bad), int(kib) / 1024


def test_a_gzip_bomb_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(b'{"text": "first"}\n')
        for _ in range(400):
            out.write(b"x" * (1 << 20))
        out.write(b'\n{"text": "last"}\n')
    assert path.stat().st_size < 4 << 20
    good, bad, grown = peak(path)
    assert (good, bad) == (2, 1)
    assert grown < 60


def test_long_texts_in_one_row_group_are_read_a_few_at_a_time(tmp_path):
    texts = [f"{number:08d}" * (1 << 17) for number in range(150)]
    schema = pa.schema({"text": pa.string()})
    with pa.parquet.ParquetWriter(tmp_path / "a.parquet", schema, compression="none", use_dictionary=False) as writer:
        writer.write_table(pa.table({"text": texts}), row_group_size=150)
    good, bad, grown = peak(tmp_path / "a.parquet")
    assert (good, bad) == (150, 0)
    assert grown < 110  # 150 MiB of text in a row group


def test_a_text_repeated_by_a_dictionary_is_not_unrolled(tmp_path):
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1200, pa.int32()), pa.array(["x" * (1 << 20)]))
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": column.type})) as writer:
        writer.write_table(pa.table({"text": column}))
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        good, _, grown = peak(tmp_path / name)
        assert good == 1200
        assert grown < 400, name


def test_gzip_may_have_several_members_and_zeros_behind_them(tmp_path):
    path = tmp_path / "a.txt.gz"
    for zeros in (0, 1, 512, (1 << 20) + 7):
        path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\nthree\n") + bytes(zeros))
        assert [record.text for record in records(only(path))] == ["one", "two", "three"]
    path.write_bytes(gzip.compress(b"one\n") + bytes(10) + b"x")
    with pytest.raises(SourceError, match="could not be read to its end as gzip"):
        records(only(path))


def test_a_failure_of_the_disk_is_no_bad_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")

    class Failing(io.BytesIO):
        def read(self, size: int = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage, "open_input", lambda uri: Failing())
    with pytest.raises(DataUnavailableError, match=r"a\.txt was to be read: .*Input/output error.*is kept") as caught:
        records(only(path))
    assert (caught.value.exit_code, caught.value.retryable) == (1, True)


def test_a_label_beyond_256_bytes_is_a_reject(tmp_path):
    path = tmp_path / "a.jsonl"
    labels = ["x" * 256, "x" * 257, "帆" * 86, 10**200, 10**400, -(10**900)]
    path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels))
    found = records(only(path, label="label"))
    assert [isinstance(one, Reject) for one in found] == [False, True, True, False, True, True]
    assert {one.reason for one in found if isinstance(one, Reject)} == {"label over-long: more than 256 bytes"}
