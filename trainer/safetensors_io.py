"""The safetensors format, written and read piece by piece.

The library's own writer wants all tensors in memory and its reader a local file; parts and exports are streamed tensor
by tensor, to and from object stores. Format: https://github.com/huggingface/safetensors#format. No torch here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_service.errors import ConfigError

__all__ = ["DTYPE_BYTES", "MAX_HEADER_BYTES", "PREFIX_BYTES", "TensorEntry", "make_header", "parse_header"]

PREFIX_BYTES = 8
"""A file starts with the length of its header, little-endian."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound; a longer header is not read."""

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
"""Dtypes of weights that are read here, and their width."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    num_bytes: int


def make_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[TensorEntry]]:
    """The first bytes of a file whose tensors follow without gaps in the order given.

    Args:
        tensors: (name, dtype as the format spells it, shape).
        metadata: strings that the header carries.

    Returns:
        Prefix and header, padded so that data starts at a multiple of 8 bytes; and where each tensor will lie.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + DTYPE_BYTES[dtype] * math.prod(shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = PREFIX_BYTES + len(text)
    entries = [
        TensorEntry(name, dtype, shape, data_start + fields[name]["data_offsets"][0], _length(fields[name]))
        for name, dtype, shape in tensors
    ]
    return len(text).to_bytes(PREFIX_BYTES, "little") + text, entries


def parse_header(text: bytes, file: str) -> dict[str, TensorEntry]:
    """Entries of a file by name.

    Args:
        text: the header, without the prefix.
        file: named in errors.

    Raises:
        ConfigError: the header is not one, or an entry contradicts itself.
    """
    try:
        fields = json.loads(text)
        fields.pop("__metadata__", None)
        entries = {name: _entry(name, value, PREFIX_BYTES + len(text)) for name, value in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no safetensors file: {error!r}. Fetch or export the folder again.") from error
    for entry in entries.values():
        width = DTYPE_BYTES.get(entry.dtype)
        if width is not None and entry.num_bytes != width * math.prod(entry.shape):
            raise ConfigError(
                f"{file}: {entry.name} of shape {entry.shape} and dtype {entry.dtype} cannot take {entry.num_bytes} "
                "bytes. Fetch or export the folder again."
            )
    return entries


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    shape = tuple(int(width) for width in value["shape"])
    return TensorEntry(name, str(value["dtype"]), shape, data_start + int(value["data_offsets"][0]), _length(value))


def _length(value: Any) -> int:
    begin, end = value["data_offsets"]
    return int(end) - int(begin)
