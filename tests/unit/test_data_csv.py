"""CSV in which a broken record costs itself, whatever stands around it."""

import io

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
