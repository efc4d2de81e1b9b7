"""Source files of every format with the same records, and what is read of them."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from data_service.config import SourceConfig
from data_service.readers import Record, Reject, SourceFile, find_files, read_records

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
