"""Why a request is not answered, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's `type` of an error by its status; other 4xx are invalid_request_error, 5xx server_error."""


class Refusal(Exception):
    """A request that is refused: an HTTP status, what is wrong with advice, and the field at fault."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """code: a name for programs; retry_after: seconds after which the same request may be answered."""
        message = _proper(message)
        super().__init__(message)
        self.message, self.param = message, None if param is None else _proper(param)
        self.status, self.code, self.retry_after = status, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers beside it."""
        more = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        return {**more, **({"www-authenticate": 'Basic realm="megatrain", charset="UTF-8"'} if self.status == 401 else {})}


def _proper(text: str) -> str:
    """Text as JSON can have it: what a client sent may hold half a character."""
    return text.encode(errors="replace").decode()
