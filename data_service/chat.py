"""Chats → text and tokens, by the Jinja template that a tokenizer carries, as `transformers.apply_chat_template` does.

    messages ─ ChatTemplate ─▶ text, spans of the assistant's words ─ ChatRenderer ─▶ tokens, which of them count

The spans come from the template's {% generation %} blocks where it has them, and else from what each message of the
assistant adds to the chat before it; both reach over the token that ends the turn. Templates are foreign code: they run
in Jinja's immutable sandbox and see plain strings alone. `strftime_now` gives one fixed day, so that a dataset prepared
tomorrow is the same.

Owns rendering. Refuses chats that hold nothing to learn, or that spell a control token: they would end a turn in the
middle of a message.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_service import storage
from data_service.chat_sandbox import BLOCK_CLOSE, BLOCK_OPEN, template_environment
from data_service.errors import ConfigError
from data_service.tokenizer import END_TOKEN, TokenizerFiles, read_tokenizer, trained_specials

__all__ = [
    "ChatError",
    "ChatRenderer",
    "ChatTemplate",
    "EncodedChats",
    "RenderedChat",
    "load_renderer",
    "messages_of",
    "read_chat_template",
]

ASSISTANT = "assistant"
_MAX_MESSAGES = 1000
"""Without {% generation %} blocks the work grows with the square of a chat's messages."""
_PROBE = ({"role": "user", "content": "A question."}, {"role": ASSISTANT, "content": "An answer."})


class ChatError(ValueError):
    """A chat cannot be used; the text is the reason, for the list of rejects."""


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """[first, end) of characters whose tokens count as labels; ascending, at least one, none empty."""


@dataclass(frozen=True)
class EncodedChats:
    """Chats as tokens, d of them with S tokens in all."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[S], the chats one after the other; each ends with the end token."""
    lengths: npt.NDArray[np.uint32]
    """[d]"""
    answers: npt.NDArray[np.bool_]
    """[S]: the token counts as a label."""


def messages_of(text: str) -> list[dict[str, str]]:
    """The messages of a chat record from its canonical JSON.

    Raises:
        ChatError: when it is not a list of {role, content}.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ChatError(f"broken chat: {error}") from error
    if not isinstance(value, list) or not value:
        raise ChatError("broken chat: not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ChatError("broken chat: a message is not {role, content} with two texts")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def read_chat_template(path: str) -> str:
    """The template in a file, `data.chat_template`.

    Raises:
        ConfigError: when it is missing or no text.
    """
    try:
        return storage.read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template={path}: it cannot be read: {error}. Name a file with a Jinja template."
        ) from error


class ChatTemplate:
    """A compiled template."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, control_tokens: Sequence[str] = ()
    ) -> None:
        """Compile a template and try it.

        Args:
            source: Jinja.
            special_tokens: names such as `bos_token` that the template may use, and their texts.
            control_tokens: texts of the special tokens; no message may hold one.

        Raises:
            ConfigError: when it is not a template, or does not tell what the assistant said.
        """
        self._specials = dict(special_tokens or {})
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._has_blocks = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source) is not None
        try:
            self._template = template_environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"a chat template was asked for, this is none: {error}. Repair data.chat_template, or the tokenizer's "
                "own."
            ) from error
        problem = None if self._has_blocks else self._unstable(_PROBE)
        if problem is not None:
            raise ConfigError(
                f"the words of the assistant were to be found in what the chat template writes, and {problem}. Give "
                "data.chat_template a file of the template with {% generation %} … {% endgeneration %} around them."
            )

    @classmethod
    def of(cls, files: TokenizerFiles) -> "ChatTemplate":
        """The template of a tokenizer.

        Raises:
            ConfigError: when it has none, or one that cannot be used.
        """
        if files.chat_template is None:
            raise ConfigError(
                "data.sources…messages was set, and the tokenizer has no chat template. Set data.chat_template to a "
                "Jinja file, or data.tokenizer.path to the tokenizer of a chat model."
            )
        return cls(files.chat_template, files.special_tokens, files.control_tokens)

    @classmethod
    def to_train(cls, template: str) -> "ChatTemplate":
        """A template as it will be for the tokenizer that `train_tokenizer` makes with it, before that is trained.

        Raises:
            ConfigError: when it cannot be used.
        """
        return cls(
            template, dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_TOKEN), trained_specials(template)
        )

    def render(self, messages: Sequence[Mapping[str, str]]) -> RenderedChat:
        """A chat as text, without a prompt for another answer.

        Args:
            messages: {role, content} each.

        Raises:
            ChatError: when the template refuses it, or nothing of it counts as a label.
        """
        if not any(message["role"] == ASSISTANT for message in messages):
            raise ChatError("no answer: the chat has no message of the assistant")
        for message in messages:
            for text in (message["role"], message["content"]):
                if self._control is not None and (found := self._control.search(text)):
                    raise ChatError(f"control token: a message spells {found.group()}")
                if BLOCK_OPEN in text or BLOCK_CLOSE in text:
                    raise ChatError("noncharacter: U+FDD0 or U+FDD1")
        text = self._written(messages)
        text, spans = _blocks(text) if self._has_blocks else (text, self._added(messages, text))
        spans = [self._to_end_of_turn(text, first, end) for first, end in spans]
        kept = tuple((first, end) for first, end in spans if first < end)
        if not kept:
            raise ChatError("no answer: the template leaves out what the assistant said")
        return RenderedChat(text, kept)

    def _written(self, messages: Sequence[Mapping[str, str]], *, prompt: bool = False) -> str:
        """What the template writes, with the marks of blocks.

        Raises:
            ChatError: for whatever the template trips over.
        """
        plain = [dict(message) for message in messages]
        try:
            return self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=prompt, **self._specials
            )
        except Exception as error:  # foreign code may raise anything
            raise ChatError(f"chat template: {type(error).__name__}: {error}"[:300]) from error

    def _unstable(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Why spans cannot be found by prefixes; None where they can, or the template refuses these messages."""
        try:
            text = self._written(messages)
        except ChatError:
            return None
        try:
            self._added(messages, text)
        except ChatError as error:
            return str(error).partition(": ")[2]
        return None

    def _added(self, messages: Sequence[Mapping[str, str]], text: str) -> list[tuple[int, int]]:
        """What each message of the assistant adds to the chat before it.

        Raises:
            ChatError: when the chat up to a message is not how the whole chat begins.
        """
        if len(messages) > _MAX_MESSAGES:
            raise ChatError(f"over-long: more than {_MAX_MESSAGES} messages")
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._written(messages[:place], prompt=True) if place else ""
            behind = text if place + 1 == len(messages) else self._written(messages[: place + 1])
            if not behind.startswith(before) or not text.startswith(behind):
                raise ChatError(
                    f"chat template: message {place + 1} changes how the messages around it are written, so that its "
                    "own words cannot be told"
                )
            spans.append((len(before), len(behind)))
        return spans

    def _to_end_of_turn(self, text: str, first: int, end: int) -> tuple[int, int]:
        """A span that ends with the control token that ends the turn, where there is one, else with its last word."""
        if self._has_blocks:
            behind = None if self._control is None else self._control.match(text, end)
            ended = self._control is not None and any(
                found.end() == end for found in self._control.finditer(text, first, end)
            )
            return (first, end if behind is None or ended else behind.end())
        last = first
        if self._control is not None:
            for found in self._control.finditer(text, first, end):
                last = found.end()
        return (first, last if last > first else first + len(text[first:end].rstrip()))


def _blocks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of blocks, and where the blocks are in it; blocks inside blocks are one."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    place = depth = begin = 0
    for piece in re.split(f"([{BLOCK_OPEN}{BLOCK_CLOSE}])", text):
        if piece == BLOCK_OPEN:
            begin = begin if depth else place
            depth += 1
        elif piece == BLOCK_CLOSE:
            depth -= 1
            if not depth:
                spans.append((begin, place))
        else:
            pieces.append(piece)
            place += len(piece)
    return "".join(pieces), spans


class ChatRenderer:
    """A tokenizer with its template: chats → tokens."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Set up.

        Raises:
            ConfigError: when the tokenizer has no template that can be used.
        """
        self.template = ChatTemplate.of(files)
        self._eos_id = files.eos_id
        self._dtype = files.token_dtype
        self._control_ids = files.control_ids
        self._tokenizer = Tokenizer.from_str(dict(files.files)["tokenizer.json"].decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """A chat's tokens, the end token last, and which of them count as labels.

        Raises:
            ChatError: as `ChatTemplate.render`.
        """
        rendered = self.template.render(messages)
        return self._masked(rendered, self._tokenizer.encode(rendered.text, add_special_tokens=False))

    def encode_chats(self, texts: Sequence[str]) -> EncodedChats:
        """Encode chats from their canonical JSON, on all threads of the tokenizer.

        Raises:
            ChatError: when one cannot be used; `ChatTemplate.render` tells beforehand.
        """
        rendered = [self.template.render(messages_of(text)) for text in texts]
        encodings = self._tokenizer.encode_batch([one.text for one in rendered], add_special_tokens=False)
        done = [self._masked(one, encoding) for one, encoding in zip(rendered, encodings, strict=True)]
        return EncodedChats(
            tokens=np.array([token for ids, _ in done for token in ids], dtype=self._dtype),
            lengths=np.array([len(ids) for ids, _ in done], dtype=np.uint32),
            answers=np.array([counts for _, mask in done for counts in mask], dtype=np.bool_),
        )

    def _masked(self, rendered: RenderedChat, encoding: Any) -> tuple[list[int], list[bool]]:
        ids: list[int] = encoding.ids
        begins = [offset[0] for offset in encoding.offsets]
        ends = [offset[1] for offset in encoding.offsets]
        mask = [False] * len(ids)
        for first, end in rendered.spans:
            low, high = bisect_right(ends, first), bisect_left(begins, end)
            mask[low:high] = [True] * (high - low)
        if not ids or ids[-1] != self._eos_id:
            # The end of the last turn, where the template writes none.
            mask.append(bool(ids) and mask[-1] and ids[-1] not in self._control_ids)
            ids = [*ids, self._eos_id]
        return ids, mask


@lru_cache(maxsize=2)
def load_renderer(folder_uri: str, digest: str) -> ChatRenderer:
    """The renderer of a tokenizer's folder. `digest` only keeps a changed folder from being reused."""
    return ChatRenderer(read_tokenizer(folder_uri))
