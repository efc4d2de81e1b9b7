"""The completions API: what a request may hold, and what an answer looks like.

Shapes follow OpenAI's API reference for `POST /v1/completions`. Two parameters are added: `top_k` and `ignore_eos`.
`suffix` and a `best_of` above `n` are refused by name; an unknown parameter is refused, never ignored.
"""

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.engine.sequence import SamplingParams
from serve.errors import InvalidRequestError

__all__ = [
    "Choice",
    "Completion",
    "CompletionRequest",
    "LogprobsReport",
    "ModelCard",
    "ModelList",
    "StreamOptions",
    "Usage",
    "parse_request",
]

MAX_PROMPTS = 64
MAX_COMPLETIONS = 128
_StopText = Annotated[str, Field(max_length=1024)]
_TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class StreamOptions(_Strict):
    """Settings of a stream."""

    include_usage: bool = False
    """Send a last chunk with the token counts."""
    include_obfuscation: bool = False
    """Accepted and without effect: no padding is added."""


class CompletionRequest(_Strict):
    """Body of `POST /v1/completions`."""

    model: str
    """Name of the served model."""
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
        | None
    ) = None
    """Text, texts, token ids, or lists of token ids; none begins a new document."""
    best_of: int | None = Field(None, ge=1, le=MAX_COMPLETIONS)
    echo: bool | None = False
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    ignore_eos: bool | None = False
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    logprobs: int | None = Field(None, ge=0, le=5)
    max_tokens: int | None = Field(16, ge=0)
    n: int | None = Field(1, ge=1, le=MAX_COMPLETIONS)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _StopText | Annotated[list[_StopText], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(1.0, ge=0, le=1)
    user: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.suffix:
            raise InvalidRequestError(
                "suffix is not supported: this model only continues text. Leave it out.", "suffix"
            )
        if self.best_of is not None and self.best_of != self.num_completions:
            raise InvalidRequestError(
                f"best_of={self.best_of} with n={self.num_completions} is not supported. "
                "Leave best_of out, or set it to n.",
                "best_of",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is set but stream is not. Set stream=true.", "stream_options")
        num_prompts = len(self.prompts)
        if num_prompts * self.num_completions > MAX_COMPLETIONS:
            raise InvalidRequestError(
                f"{num_prompts} prompts with n={self.num_completions} ask for {num_prompts * self.num_completions} "
                f"completions; a request may ask for {MAX_COMPLETIONS}. Lower n or send fewer prompts.",
                "n",
            )
        return self

    @property
    def num_completions(self) -> int:
        """Completions of each prompt."""
        return self.n if self.n is not None else 1

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or token ids."""
        if self.prompt is None:
            return [""]
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts_or_ids = [item for item in self.prompt if not isinstance(item, int)]
        return list(texts_or_ids) or [[item for item in self.prompt if isinstance(item, int)]]

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The settings as the engine takes them."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple(self._biases()),
            seed=self.seed,
            stop=tuple(stop for stop in stops if stop),
            logprobs=self.logprobs,
            prompt_logprobs=bool(self.echo) and self.logprobs is not None,
            ignore_eos=bool(self.ignore_eos),
        )

    def _biases(self) -> list[tuple[int, float]]:
        biases = []
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit()):
                raise InvalidRequestError(f"logit_bias has the key {key!r}. Keys are token ids.", "logit_bias")
            biases.append((int(key), bias))
        return biases


class LogprobsReport(BaseModel):
    """Log-probabilities of a choice, position by position."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class Choice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: LogprobsReport | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """An answer, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """An entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stormjib"
    max_model_len: int
    system_fingerprint: str


class ModelList(BaseModel):
    """Body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def parse_request(body: bytes) -> CompletionRequest:
    """Read a request's body.

    Raises:
        InvalidRequestError: it is not JSON, or a parameter is unknown or out of bounds; names the parameter.
    """
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as cause:
        raise _explain(cause) from cause


def _explain(cause: ValidationError) -> InvalidRequestError:
    problem: dict[str, Any] = dict(cause.errors(include_url=False)[0])
    place = problem["loc"]
    if problem["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {problem['msg']}.")
    if not place:
        return InvalidRequestError("the body is not a JSON object. Send one with model and prompt.")
    # pydantic adds the branch of a union to the place; only names and positions mean something to a client
    name = str(place[0])
    if problem["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in place)
        near = difflib.get_close_matches(name, CompletionRequest.model_fields, 1) if len(place) == 1 else []
        hint = f" Did you mean {near[0]}?" if near else " Leave it out."
        return InvalidRequestError(f"unknown parameter {key}.{hint}", key)
    if problem["type"] == "missing":
        return InvalidRequestError(f"{name} is missing. Send it.", name)
    if name == "prompt":
        return InvalidRequestError(
            f"prompt: expected text, token ids, or a list of at most {MAX_PROMPTS} of either, not empty.", name
        )
    if name == "stop":
        return InvalidRequestError(
            "stop: expected a text, or a list of at most 4, of at most 1024 characters each.", name
        )
    found = problem["input"]
    shown = repr(found) if len(repr(found)) <= 80 else f"a {type(found).__name__}"
    return InvalidRequestError(f"{name}={shown}: {problem['msg']}.", name)
