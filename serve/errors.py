"""Errors of the endpoint and its engine.

StormjibError
└── ServeError
    ├── InvalidRequestError     a request the API cannot take: HTTP 400, names the parameter
    │   ├── PromptTooLongError  prompt and completion exceed the context or the KV cache
    │   └── ModelNotFoundError  the request names another model: HTTP 404
    ├── AuthenticationError     the bearer key is missing or wrong: HTTP 401
    ├── RouteError              no such route, or another method: HTTP 404, 405
    ├── PayloadTooLargeError    the body is larger than any prompt: HTTP 413
    ├── OverloadedError         the queue is full: HTTP 429, retryable, says when
    ├── ModelNotReadyError      no engine replica answers: HTTP 503, retryable
    └── EngineFailedError       the engine's step raised: HTTP 500
"""

from typing import Any

from data_service.errors import StormjibError

__all__ = [
    "AuthenticationError",
    "EngineFailedError",
    "InvalidRequestError",
    "ModelNotFoundError",
    "ModelNotReadyError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PromptTooLongError",
    "RouteError",
    "ServeError",
]


class ServeError(StormjibError):
    """The endpoint failed or refused."""

    status = 500
    code: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by class, message and attributes: Ray carries errors between processes."""
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class InvalidRequestError(ServeError):
    """The request cannot be taken as it is."""

    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        """Keep the parameter's name.

        Args:
            message: what was asked, what was found, what to change.
            param: name of the request's field, where one is at fault.
        """
        super().__init__(message)
        self.param = param


class PromptTooLongError(InvalidRequestError):
    """The prompt, with the tokens asked for, exceeds the context or the KV cache."""

    code = "context_length_exceeded"


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served here."""

    status = 404
    code = "model_not_found"


class AuthenticationError(ServeError):
    """The bearer key is missing or wrong."""

    status = 401
    code = "invalid_api_key"


class RouteError(ServeError):
    """The address, or the method on it, does not exist."""

    def __init__(self, message: str, status: int) -> None:
        """Keep the status (404 or 405)."""
        super().__init__(message)
        self.status = status


class PayloadTooLargeError(ServeError):
    """The body of the request is larger than any prompt could be."""

    status = 413


class OverloadedError(ServeError):
    """Too many requests wait already."""

    status = 429
    code = "rate_limit_exceeded"
    retryable = True

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Keep the advice.

        Args:
            message: what was asked, what was found, what to change.
            retry_after_s: seconds after which a new try is worth it.
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelNotReadyError(ServeError):
    """No engine replica can answer at present."""

    status = 503
    code = "model_not_ready"
    retryable = True


class EngineFailedError(ServeError):
    """A step of the engine raised; its sequences are lost."""

    code = "engine_failed"


def _rebuild(kind: type[ServeError], args: tuple[Any, ...], state: dict[str, Any]) -> ServeError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error
