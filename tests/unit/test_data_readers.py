"""Source files of every format, plain and compressed: the same records, each reject with its place."""

import json

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from data_service.errors import SourceError
from data_service.readers import Message, Record, Reject, find_files
from tests.helpers.sources import LIMIT, only, records, rows, source, write


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


def test_a_label_beyond_256_bytes_is_a_reject(tmp_path):
    path = tmp_path / "a.jsonl"
    labels = ["x" * 256, "x" * 257, "帆" * 86, 10**200, 10**400, -(10**900)]
    path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels))
    found = records(only(path, label="label"))
    assert [isinstance(one, Reject) for one in found] == [False, True, True, False, True, True]
    assert {one.reason for one in found if isinstance(one, Reject)} == {"label over-long: more than 256 bytes"}
