"""CSV and TSV files full of what goes wrong in them, and which of their rows are good.

The writer knows the truth: a good row is one that a careful writer made, a bad line one that it spoiled. One thing is
avoided: behind a quote that is never closed stands a good row that begins with a quote and a letter, since `"open` and,
lines later, a field that begins with a comma or a line break make one record by any grammar.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

LIMIT = 4096
"""Bytes of a record that the files are written for."""

_ENDS = re.compile(r"\r\n|\r|\n")
_TEXTS = (
    "plain words",
    "comma, comma,, comma",
    'quotes "in" the middle',
    '"quoted from the start" and on',
    'ends with a quote"',
    '"',
    '""',
    "two\nlines",
    "two\r\nlines",
    "two\rlines",
    "\nbegins with a line end",
    ",begins with a comma",
    "ends with a line end\n",
    "many\n\n\nblank, lines",
    "tab\tinside",
    "  spaces around  ",
    "中文，标点。“引号”",
    "e\u0301 🙂 \u2028 \x85 \x0b separators that end no line",
    "\ufeffa mark inside",
    "\x01\x1b control characters",
    'back\\slash \\"escaped\\"',
    "x" * (LIMIT - 100),
)
_NO_UTF8 = (
    b"caf\xe9 in latin-1",
    "中文".encode("gbk"),
    "日本語".encode("shift-jis"),
    b"cut off \xe4\xb8",
    b"surrogate \xed\xa0\x80",
    b"overlong \xc0\xaf",
    b"beyond \xf5\x80\x80\x80",
    b"mark \xff\xfe inside",
)


@dataclass
class HellFile:
    """A file, and what is to be found in it."""

    name: str
    data: bytes
    text: str
    """Name of the text column."""
    label: str | None
    good: list[tuple[int, str, str | None]] = field(default_factory=list)
    """(line, text, label) of the good rows."""
    bad: list[int] = field(default_factory=list)
    """Lines of the bad ones."""


class _Writer:
    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.tab = self.chance.random() < 0.15
        self.delimiter = "\t" if self.tab else ","
        self.utf16 = self.chance.random() < 0.12
        self.ends = self.chance.choice([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r"], ["\n", "\r\n"]])
        self.width = self.chance.randint(1, 4)
        self.text_at = self.chance.randrange(self.width)
        others = [place for place in range(self.width) if place != self.text_at]
        self.label_at = self.chance.choice(others) if others and self.chance.random() < 0.6 else None
        self.always_quotes = self.chance.random() < 0.3
        self.parts: list[bytes] = []
        self.line = 1
        self.last_end = ""
        self.good: list[tuple[int, str, str | None]] = []
        self.bad: list[int] = []

    def encode(self, text: str) -> bytes:
        return text.encode("utf-16-le" if self.utf16 else "utf-8", "surrogatepass")

    def put(self, row: str | bytes, end: str | None = None) -> int:
        """Write a row and its line end; returns the line it began on."""
        began = self.line
        shown = row if isinstance(row, str) else row.decode("latin-1")
        end = self.chance.choice(self.ends) if end is None else end
        self.parts.append(self.encode(row) if isinstance(row, str) else row)
        self.parts.append(self.encode(end))
        self.line += len(_ENDS.findall(shown)) + bool(end)
        self.last_end = end
        return began

    def quoted(self, text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    def cell(self, text: str) -> str:
        must = text.startswith('"') or any(mark in text for mark in (self.delimiter, "\n", "\r"))
        if must or self.always_quotes or self.chance.random() < 0.2:
            return self.quoted(text)
        return text

    def filler(self) -> list[str]:
        """Cells of a row, the text's still to be set."""
        return [self.cell(self.chance.choice(["0", "1", "a b", "x;y", "类", "3.5"])) for _ in range(self.width)]

    def label_of(self, cells: list[str]) -> str | None:
        return None if self.label_at is None else cells[self.label_at].strip('"')

    def good_row(self, text: str | None = None, cell: str | None = None, end: str | None = None) -> None:
        chosen = self.chance.choice(_TEXTS)
        text = chosen if text is None else text
        if self.tab and "\t" in text and ("\n" in text or "\r" in text):
            text = "a tab\tinside"
        cells = self.filler()
        cells[self.text_at] = self.cell(text) if cell is None else cell
        if self.width == 1 and not cells[0].strip('"').strip():
            return
        self.good.append((self.put(self.delimiter.join(cells), end), text, self.label_of(cells)))

    def safe_row(self) -> None:
        """A good row whose first cell opens a quote before a letter: no reading ends a record there."""
        cells = self.filler()
        number = len(self.good)
        text = f"row {number}, quoted"
        cells[self.text_at] = self.quoted(text)
        if self.text_at:
            cells[0] = self.quoted(cells[0].strip('"'))
        self.good.append((self.put(self.delimiter.join(cells)), text, self.label_of(cells)))

    def bad_row(self, cells: list[str] | bytes, end: str | None = None) -> None:
        row = cells if isinstance(cells, bytes) else self.delimiter.join(cells)
        self.bad.append(self.put(row, end))

    def spoiled(self) -> None:
        """One bad record."""
        cells = self.filler()
        kind = self.chance.choice(_SPOILED_UTF16 if self.utf16 else _SPOILED)
        if kind in ("open", "behind", "open at the end") and self.tab:
            kind = "ragged"
        if kind == "open":
            place = self.chance.randrange(self.width)
            cells[place] = self.chance.choice(['"never closed', '"a""b', '"', '"""x', '" ""y"" z'])
            for later in range(place, self.width):
                cells[later] = cells[later] if later == place else cells[later].strip('"')
            self.bad_row(cells)
            self.safe_row()
        elif kind == "behind":
            cells[self.chance.randrange(self.width)] = self.chance.choice(['"text" behind', '"a"b"', '"" x', '"x"""y'])
            self.bad_row(cells)
            self.safe_row()
        elif kind == "ragged":
            cells = [cell.strip('"') for cell in cells]
            more = self.width == 1 or self.chance.random() < 0.5
            self.bad_row([*cells, "more"] if more else cells[:-1] if self.width > 2 else ["only one"])
        elif kind == "NUL":
            cells[self.text_at] = self.cell("before\0behind")
            self.bad_row(cells)
        elif kind == "surrogate":
            cells[self.text_at] = "lone \ud800 surrogate"
            self.bad_row(cells)
        elif kind == "encoding":
            wrong = self.chance.choice(_NO_UTF8)
            marker = "MARKER, quoted" if self.chance.random() < 0.3 else "MARKER"
            cells[self.text_at] = self.cell(marker)
            self.bad_row(self.encode(self.delimiter.join(cells)).replace(b"MARKER", wrong))
        elif kind == "empty":
            cells[self.text_at] = self.chance.choice(['""', '"  "', " \u3000 ", '"\n"', '" \r\n "'])
            self.bad_row(cells)
        elif kind == "over-long":
            cells[self.text_at] = self.cell("y" * (LIMIT + self.chance.randint(1, 3 * LIMIT)))
            self.bad_row(cells)

    def blank(self) -> None:
        # A line feed behind a carriage return would not be a line of its own.
        self.put("", "\r" if self.last_end == "\r" else self.chance.choice(self.ends))

    def last(self) -> None:
        """How the file ends."""
        kind = self.chance.choice(["line end", "no line end", "quote", "open", "lone quote", "blank lines"])
        if kind == "no line end":
            self.good_row("the last row", end="")
        elif kind == "quote":
            self.good_row("the last row, quoted", end="")
        elif kind == "blank lines":
            for _ in range(3):
                self.blank()
        elif kind in ("open", "lone quote") and not self.tab:
            cells = [cell.strip('"') for cell in self.filler()]
            cells[-1] = '"open' if kind == "open" else '"'
            self.bad_row(cells, end="")


_SPOILED_UTF16 = ("open", "behind", "ragged", "NUL", "surrogate", "empty", "over-long")
_SPOILED = (*_SPOILED_UTF16, "encoding", "encoding")


def make(seed: int, num_rows: int = 80) -> HellFile:
    """One file, the same for the same seed."""
    writer = _Writer(seed)
    names = [f"column {place}" for place in range(writer.width)]
    names[writer.text_at] = "text"
    shown = [writer.quoted(name) if writer.chance.random() < 0.3 else f" {name} " for name in names]
    writer.put(writer.delimiter.join(shown))
    share = writer.chance.choice([0.0, 0.1, 0.5, 0.9])
    for _ in range(num_rows):
        what = writer.chance.random()
        if what < 0.05:
            writer.blank()
        elif what < 0.05 + share:
            writer.spoiled()
        else:
            writer.good_row()
    writer.safe_row()
    if writer.tab:
        # Unquoted TSV: what opens with a quote is ordinary text.
        writer.good_row('"never closed', cell='"never closed')
        writer.good_row('"text" behind', cell='"text" behind')
        writer.safe_row()
    writer.last()
    data = b"".join(writer.parts)
    if writer.utf16:
        data = b"\xff\xfe" + data
        data = _swapped(data) if writer.chance.random() < 0.5 else data
    elif writer.chance.random() < 0.3:
        data = b"\xef\xbb\xbf" + data
    label = None if writer.label_at is None else names[writer.label_at]
    name = f"hell-{seed}.{'tsv' if writer.tab else 'csv'}"
    return HellFile(name, data, "text", label, writer.good, writer.bad)


def _swapped(data: bytes) -> bytes:
    """UTF-16 with its bytes in the other order."""
    out = bytearray(len(data))
    out[0::2], out[1::2] = data[1::2], data[0::2]
    return bytes(out)


def huge(num_bytes: int, lines: bool) -> Iterator[bytes]:
    """Pieces of a CSV of which one field has `num_bytes`, in one line, or quoted and over many lines of 1 KiB.

    Line 2 is good, line 3 holds the field, and the last line is good.
    """
    yield b'id,text\n1,"before"\n2,"'
    piece = b"y" * 1023 + b"\n" if lines else b"z" * 1024
    for _ in range(num_bytes // (1 << 20)):
        yield piece * 1024
    yield b'"\n3,"behind"\n'
