"""How every application here tells errors: in OpenAI's form, and of those that are the server's the log hears."""

import traceback
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ....kernels.native import KernelError
from .answers import INVALID, Refused, error_body


def place_of(error: Exception) -> str:
    """What broke and where, without the exception's words: those may be a prompt's. A kernel's are effc's own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f": {error}" if isinstance(error, KernelError) else ""
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}{said}"


def write_down(call: Call, fault: str) -> str:
    """Give the log a fault inside; what the client hears of it, which is where the log has it."""
    call.state.fault = fault
    return failure(call.scope.get("state", {}).get("request", "the request's id"))


def failure(request: str) -> str:
    return f"the server failed; its log tells more under {request}"


def tell_errors(app: FastAPI) -> None:
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _unrouted)


async def _refused(call: Call, error: Any) -> JSONResponse:
    if error.status >= 500:
        call.scope.setdefault("state", {}).setdefault("fault", error.body["error"]["code"] or "failed")  # for the log
    return JSONResponse(error.body, error.status, error.headers)


async def _unrouted(call: Call, error: Any) -> JSONResponse:
    nothing = error.status_code in (404, 405)
    what = f"there is no {call.method} {call.url.path:.80} here" if nothing else str(error.detail)
    return JSONResponse(error_body(what, INVALID), error.status_code, error.headers)
