"""Source files that are damaged, compressed or oddly encoded: named, never read as shorter ones, in bounded memory."""

import errno
import gzip
import io
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from data_service import storage
from data_service.errors import DataUnavailableError, SourceError
from data_service.readers import Record, read_records
from tests.helpers.sources import LIMIT, only, records


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
