"""Errors in the shape OpenAI clients expect: `{"error": {"message", "type", "param", "code"}}`."""

from pydantic import BaseModel

from serve.errors import InvalidRequestError, OverloadedError, ServeError

__all__ = ["ErrorBody", "ErrorDetail", "error_body", "error_headers"]

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Body of every 4xx and 5xx."""

    error: ErrorDetail


def error_body(error: ServeError) -> ErrorBody:
    """The body that describes an error."""
    param = error.param if isinstance(error, InvalidRequestError) else None
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return ErrorBody(error=ErrorDetail(message=str(error), type=kind, param=param, code=error.code))


def error_headers(error: ServeError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, OverloadedError):
        return {"retry-after": str(max(1, round(error.retry_after_s)))}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}
