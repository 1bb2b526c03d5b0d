"""How every application here tells errors: in OpenAI's form, and of those that are the server's the log hears."""

from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .answers import INVALID, Refused, error_body


def tell_errors(app: FastAPI) -> None:
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _unrouted)


async def _refused(call: Call, error: Any) -> JSONResponse:
    if error.status >= 500:
        call.state.fault = error.body["error"]["code"] or "failed"  # for the log
    return JSONResponse(error.body, error.status, error.headers)


async def _unrouted(call: Call, error: Any) -> JSONResponse:
    nothing = error.status_code in (404, 405)
    what = f"there is no {call.method} {call.url.path:.80} here" if nothing else str(error.detail)
    return JSONResponse(error_body(what, INVALID), error.status_code, error.headers)
