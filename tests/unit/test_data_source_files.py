"""Which files a source names: folders, globs, hidden files, files that are reached twice, and their fingerprints."""

import os

import pytest

from data_service import storage
from data_service.errors import SourceError
from data_service.readers import find_files, fingerprint
from tests.helpers.sources import source


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
