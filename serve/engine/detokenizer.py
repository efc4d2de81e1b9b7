"""Token ids to text, piece by piece, never half a character.

Owns incremental decoding and the search for stop texts. The pieces of a completion concatenate to what decoding all its
tokens at once gives, except that bytes of a character that was never finished are left out.
"""

import codecs
import json
from typing import Any, Protocol

from tokenizers import Tokenizer

__all__ = ["Decoder", "StopFinder", "Vocabulary"]


class Decoder(Protocol):
    """Incremental decoding of one completion."""

    def feed(self, token: int) -> str:
        """Text that this token completes; often a whole word, sometimes nothing."""
        ...


class Vocabulary:
    """A tokenizer, seen from the decoding side."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the decoder's kind and the special tokens."""
        self.tokenizer = tokenizer
        document: dict[str, Any] = json.loads(tokenizer.to_str())
        self._special = {t["id"] for t in document.get("added_tokens", []) if t["special"]}
        self._added: dict[int, str] = {t["id"]: t["content"] for t in document.get("added_tokens", [])}
        self._byte_level = (document.get("decoder") or {}).get("type") == "ByteLevel"
        self._bytes = _byte_alphabet() if self._byte_level else {}
        self._cache: dict[int, bytes] = {}

    def decoder(self) -> Decoder:
        """A decoder for one completion."""
        return _ByteLevelDecoder(self) if self._byte_level else _PrefixDecoder(self)

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of the text."""
        return token in self._special

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token by itself; for ids without a token, nothing."""
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._read_bytes(token)
        return found

    def token_text(self, token: int) -> str:
        r"""A token as log-probability reports show it: its text, or `bytes:\xe8\xbf` where it is half a character."""
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _read_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self.tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(self._bytes[character] for character in piece)
        return str(self.tokenizer.decode([token], skip_special_tokens=False)).encode()


class _ByteLevelDecoder:
    """Byte-level vocabularies: bytes are known per token, and UTF-8 tells where a character ends."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        if self._vocabulary.is_special(token):
            return ""
        return self._utf8.decode(self._vocabulary.token_bytes(token))


class _PrefixDecoder:
    """Any other vocabulary: decode a short window twice and take the difference.

    The window starts at a point where text was complete, because some decoders treat a first token specially.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._tokens: list[int] = []
        self._start = 0
        self._read = 0

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._start : self._read], skip_special_tokens=True)
        now = self._tokenizer.decode(self._tokens[self._start :], skip_special_tokens=True)
        if now.endswith("\N{REPLACEMENT CHARACTER}") or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return str(now[len(before) :])


class StopFinder:
    """Finds the first stop text in a growing completion and holds back what might be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Watch for these texts."""
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Take a new piece; returns what may be shown. After `found` nothing more may."""
        if not self._stops:
            return text
        self._held += text
        hits = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self.found = True
            shown, self._held = self._held[: min(hits)], ""
            return shown
        keep = self._longest_beginning()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once it is known that nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _longest_beginning(self) -> int:
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


def _byte_alphabet() -> dict[str, int]:
    """Characters that stand for bytes in byte-level vocabularies (GPT-2: `bytes_to_unicode` in its encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet
