"""Errors of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

INVALID = "invalid_request_error"


class ErrorResponse(Exception):
    """A request that is answered by an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else INVALID
        self.body = error_body(message, kind, param, code)


def error_body(message: str, error_type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}
