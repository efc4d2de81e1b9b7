"""CSV in which a broken record costs itself, whatever stands around it."""

import csv
import io
import random

import pytest

from data_service.csv_records import BrokenRecord, CsvRecord, read_csv_records


def parse(data: bytes, limit: int = 10_000):
    good, broken = [], []
    for record in read_csv_records(io.BytesIO(data), limit):
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
