"""What a reader yields: a record of text or of a chat, or why a record was left out.

Owns the checks that every format shares: UTF-8, no NUL, not blank, not over the limit, labels and chats of a known
shape. Knows nothing of files.
"""

import json
from dataclasses import dataclass
from typing import Any

__all__ = [
    "MAX_LABEL_BYTES",
    "Message",
    "Record",
    "Reject",
    "chat_record",
    "label_of",
    "over_long",
    "text_of",
    "text_record",
]


MAX_LABEL_BYTES = 256
"""Of a class's name; what is longer is no class."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A document, and the line (Parquet, Arrow: the row, from 1) that it begins on."""

    line: int
    text: str
    """For a chat the canonical JSON of its messages, which is what is hashed."""
    label: str | None = None
    """None where the source names no label."""
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that was left out."""

    line: int
    reason: str
    """The kind, a colon, and the particulars where there are any."""


class _Unfit(ValueError):
    """The record is to be left out; the message is the reason."""


def text_of(data: bytes | str, what: str) -> str:
    """A string without what no text holds.

    Args:
        data: as the file has it.
        what: names it in the reason, such as `the label`.

    Raises:
        ValueError: with the reason to leave the record out.
    """
    if isinstance(data, bytes):
        try:
            data = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Unfit(f"invalid UTF-8: {error.reason} at byte {error.start} of {what}") from None
    elif not data.isascii():
        try:
            data.encode("utf-8")
        except UnicodeEncodeError:
            raise _Unfit(f"invalid UTF-8: a lone surrogate in {what}") from None
    if "\0" in data:
        raise _Unfit(f"NUL character: in {what}")
    return data


def label_of(value: Any) -> str:
    """A label as text: strings without the blanks around them, integers and truth values as JSON writes them.

    Raises:
        ValueError: with the reason to leave the record out.
    """
    if isinstance(value, bytes | str):
        label = text_of(value, "the label").strip()
    elif isinstance(value, bool):
        label = "true" if value else "false"
    elif isinstance(value, int):
        label = str(value) if value.bit_length() <= 8 * MAX_LABEL_BYTES // 3 else "0" * (MAX_LABEL_BYTES + 1)
    elif value is None:
        label = ""
    else:
        raise _Unfit(f"bad label: {type(value).__name__}, neither a string nor an integer")
    if not label:
        raise _Unfit("no label")
    if len(label) > MAX_LABEL_BYTES or _num_bytes(label) > MAX_LABEL_BYTES:
        raise _Unfit(f"label over-long: more than {MAX_LABEL_BYTES} bytes")
    return label


def text_record(line: int, data: bytes | str, max_record_bytes: int, label: str | None = None) -> Record | Reject:
    """A record of plain text, or why it is none."""
    if len(data) > max_record_bytes or (
        isinstance(data, str) and len(data) * 4 > max_record_bytes and _num_bytes(data) > max_record_bytes
    ):
        return over_long(line, max_record_bytes)
    try:
        text = text_of(data, "the text")
    except ValueError as error:
        return Reject(line, str(error))
    if not text.strip():
        return Reject(line, "empty text")
    return Record(line, text, label)


def over_long(line: int, max_record_bytes: int) -> Reject:
    """The reject for a record beyond the limit."""
    return Reject(line, f"over-long: more than {max_record_bytes} bytes")


def chat_record(line: int, value: Any, max_record_bytes: int, label: str | None = None) -> Record | Reject:
    """A record of a chat, or why it is none.

    Args:
        line: where it begins.
        value: a list of mappings with `role` and `content`, or JSON that says the same.
        max_record_bytes: limit of its canonical JSON.
        label: passed on.
    """
    if isinstance(value, bytes | str):
        if len(value) > max_record_bytes:
            return over_long(line, max_record_bytes)
        try:
            value = json.loads(text_of(value, "the messages"))
        except _Unfit as error:
            return Reject(line, str(error))
        except (ValueError, RecursionError) as error:
            return Reject(line, f"bad messages: not JSON: {error}"[:200])
    try:
        messages = _messages(value)
    except ValueError as error:
        return Reject(line, str(error))
    turns = [{"role": message.role, "content": message.content} for message in messages]
    text = json.dumps(turns, ensure_ascii=False, separators=(",", ":"))
    if len(text) * 4 > max_record_bytes and _num_bytes(text) > max_record_bytes:
        return over_long(line, max_record_bytes)
    return Record(line, text, label, messages)


def _messages(value: Any) -> tuple[Message, ...]:
    """Raises ValueError with the reason where the value is no chat."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else type(value).__name__
        raise _Unfit(f"bad messages: {found}, not a list of messages")
    messages = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise _Unfit(f"bad messages: message {number} is {type(turn).__name__}, not {{role, content}}")
        parts = []
        for key in ("role", "content"):
            part = turn.get(key)
            if not isinstance(part, bytes | str):
                found = f"has a {key} of type {type(part).__name__}" if key in turn else f"has no {key}"
                raise _Unfit(f"bad messages: message {number} {found}, a string was expected")
            parts.append(text_of(part, f"the {key} of message {number}"))
        if not parts[0].strip():
            raise _Unfit(f"bad messages: message {number} has an empty role")
        messages.append(Message(*parts))
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise _Unfit("bad messages: the assistant says nothing, so there is nothing to learn")
    return tuple(messages)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
