"""Answers that refuse a request, in the form that clients of OpenAI's interface expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's names for kinds of errors, by status. Other 4xx are `invalid_request_error`, 5xx are `server_error`."""


class _Ascii(JSONResponse):
    """JSON with escapes for all beyond ASCII: a message may repeat half of a surrogate pair, which has no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


class Refusal(HTTPException):
    """A request that is not met.

    Args:
        status: of the answer.
        message: what is wrong and what to do.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def response(self) -> JSONResponse:
        """Return the answer."""
        return error_response(self.status_code, self.detail, self.param, self.code, self.headers)


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an answer with an error; arguments as for `Refusal`."""
    kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return _Ascii({"error": error}, status, headers)


def busy(seconds: int) -> Refusal:
    """Return the answer of a service that has no room for a request."""
    message = f"The service is busy. Try again in {seconds} s."
    return Refusal(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
