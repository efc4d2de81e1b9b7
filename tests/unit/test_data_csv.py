"""CSV in which a broken record costs itself, whatever stands around it."""

import csv
import io
import random

import pytest

from data_service.config import SourceConfig
from data_service.csv_records import BrokenRecord, CsvRecord, read_csv_records
from data_service.errors import SourceError
from data_service.readers import Record, Reject, find_files, read_records
from tests.helpers import csv_from_hell


def parse(data: bytes, limit: int = 10_000, delimiter: bytes = b","):
    good, broken = [], []
    for record in read_csv_records(io.BytesIO(data), limit, delimiter):
        if isinstance(record, CsvRecord):
            good.append([field.decode() for field in record.fields])
        else:
            assert isinstance(record, BrokenRecord)
            broken.append((record.line, record.reason.partition(":")[0]))
    return good, broken


def test_quotes_commas_line_breaks_and_marks_of_order():
    data = b'\xef\xbb\xbftext,label\r\n"a, ""b""\nc",x\r\nplain "word" here,y\n"",z\n\nlast,w'
    good, broken = parse(data)
    assert good == [
        ["text", "label"],
        ['a, "b"\nc', "x"],
        ['plain "word" here', "y"],
        ["", "z"],
        ["last", "w"],
    ]
    assert broken == []


@pytest.mark.parametrize(
    "bad",
    [
        b'"never closed,x\n',
        b'"text" behind,x\n',
        b'"a""b,x\n',
        b'ok,"x\n',
        b"one field\n",
        b"three,fields,here\n",
        b'"\n',
    ],
)
@pytest.mark.parametrize("behind", [b"g1,a\ng2,b\n", b'"g1",a\n"g2",b\n', b'"g\n1",a\ng2,"b"\n', b""])
def test_a_broken_record_costs_only_itself(bad, behind):
    before = b'text,label\n"first",a\n'
    expected, none = parse(before + behind)
    assert none == []
    good, broken = parse(before + bad + behind)
    assert good == expected
    assert [line for line, _ in broken] == [3]


def test_a_record_beyond_the_limit_is_cut_and_the_next_is_read():
    data = b"text,label\n" + b"x" * 5000 + b",a\n" + b'"' + b"y\n" * 400 + b"good,b\n"
    good, broken = parse(data, limit=300)
    assert good[-1] == ["good", "b"]
    assert broken[0] == (2, "over-long")
    assert broken[1] == (3, "broken quotes")


def test_many_unclosed_quotes_do_not_read_the_file_once_each():
    lines = b"".join(b'"open %d,x\n' % number for number in range(20_000))
    good, broken = parse(b"text,label\n" + lines + b"good,x\n")
    assert good == [["text", "label"], ["good", "x"]]
    assert len(broken) == 20_000


_BROKEN = ('"never closed,x', '"text" behind,x', 'ok,"open', '"a""b,x', "one field", "a,b,c", '"', "x,y" + "z" * 400)
_GOOD = ("plain", "with, comma", 'with "quotes"', "two\nlines", "", "两行\r\n中文", 'end"', "x" * 90)


@pytest.mark.parametrize("seed", range(60))
def test_good_rows_are_kept_among_any_broken_ones(seed):
    chance = random.Random(seed)
    out = io.StringIO()
    end = chance.choice(["\n", "\r\n"])
    writer = csv.writer(out, lineterminator=end, quoting=chance.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer.writerow(["text", "label"])
    kept, num_broken = [["text", "label"]], 0
    for number in range(60):
        if chance.random() < 0.3:
            out.write(chance.choice(_BROKEN) + end)
            num_broken += 1
        else:
            # Numbered, so that a row lost and a row doubled cannot make up for each other.
            row = [f"{number} " + chance.choice(_GOOD), chance.choice(_GOOD[:3])]
            writer.writerow(row)
            kept.append(row)
    good, broken = parse(out.getvalue().encode(), limit=300)
    # Broken lines may add up to a well-formed record (`ok,"open` and `"`), which then counts as one.
    numbers = [row for row in good if row[0] != "ok"]
    assert numbers == kept
    assert len(broken) == num_broken or len(good) > len(kept)


def test_tsv_is_read_with_and_without_quoting():
    data = b"""text\tlabel
"Well," she said.\t1
"Well,\t2
and so on"\t3
"quoted\ttab"\t"4"
"two
lines"\t5
"open\t"6"
\t7
"8
"""
    good, broken = parse(data, delimiter=b"\t")
    assert good[1:] == [
        ['"Well," she said.', "1"],
        ['"Well,', "2"],
        ['and so on"', "3"],
        ["quoted\ttab", "4"],
        ["two\nlines", "5"],
        ['"open', "6"],
        ["", "7"],
    ]
    assert broken == [(10, "broken quotes")]


def records_of(path, text="text", label=None, limit=csv_from_hell.LIMIT):
    (file,) = find_files((SourceConfig(path=str(path), text=text, label=label),))
    return read_records(file, limit)


@pytest.mark.parametrize("first", range(0, 500, 50))
def test_a_csv_from_hell_gives_all_good_rows_and_names_all_bad_lines(tmp_path, first):
    num_good = num_bad = 0
    for seed in range(first, first + 50):
        hell = csv_from_hell.make(seed, num_rows=150)
        path = tmp_path / hell.name
        path.write_bytes(hell.data)
        found = list(records_of(path, hell.text, hell.label))
        good = [(one.line, one.text, one.label) for one in found if isinstance(one, Record)]
        assert good == hell.good, f"seed {seed}"
        assert [one.line for one in found if isinstance(one, Reject)] == hell.bad, f"seed {seed}"
        num_good, num_bad = num_good + len(good), num_bad + len(hell.bad)
    assert num_good > 3000
    assert num_bad > 1500


@pytest.mark.parametrize("lines", [False, True])
def test_a_field_of_100_mb_costs_its_own_record(tmp_path, lines):
    path = tmp_path / "huge.csv"
    with path.open("wb") as file:
        file.writelines(csv_from_hell.huge(100 << 20, lines))
    found = list(records_of(path, limit=1 << 20))
    # Behind the limit it is not known whether the quote was a stray one: then each line counts as one.
    bad = range(3, 3 + 100 * 1024 + 1) if lines else range(3, 4)
    assert [one for one in found if isinstance(one, Record)] == [Record(2, "before"), Record(bad.stop, "behind")]
    assert [one.line for one in found if isinstance(one, Reject)] == list(bad)


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_end_in_records_or_one_clear_error(tmp_path, seed):
    chance = random.Random(seed)
    pieces = [
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\t",
        b"\0",
        b"text",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b'""',
        b"x" * 500,
        b"\xe4\xb8",
    ]
    start = chance.choice([b"", b"text\n", b"text,a\n", b"\xff\xfet\0e\0x\0t\0\n\0", b"\xfe\xff"])
    data = start + b"".join(chance.choice(pieces) for _ in range(chance.randrange(3000)))
    path = tmp_path / f"any.{chance.choice(['csv', 'tsv', 'txt', 'jsonl'])}"
    path.write_bytes(data)
    lines, message = [], str(path)
    try:
        for record in records_of(path, limit=300):
            lines.append(record.line)
            assert isinstance(record, Reject) or (record.text.strip() and "\0" not in record.text)
    except SourceError as error:
        message = str(error)
    assert str(path) in message
    assert lines == sorted(set(lines))
    assert not lines or 1 <= lines[-1] <= 1 + data.count(b"\n") + data.count(b"\r")
