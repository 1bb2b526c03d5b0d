"""Error handlers of every application: answers in OpenAI's form, the server's faults in the log as well."""

import traceback
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ....kernels.native import KernelError
from .error_response import INVALID, ErrorResponse, error_body


def traceback_location(error: Exception) -> str:
    """Error type and source line, without the exception's text: those may be a prompt's. A kernel's are effc's own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    kernel_message = f": {error}" if isinstance(error, KernelError) else ""
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}{kernel_message}"


def log_fault_and_client_message(call: Call, fault: str) -> str:
    """Give the log a fault inside; what the client hears of it, which is where the log has it."""
    call.state.fault = fault
    return failure_message(call.scope.get("state", {}).get("request", "the request's id"))


def failure_message(request_id: str) -> str:
    return f"the server failed; its log tells more under {request_id}"


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ErrorResponse, _error_response)
    app.add_exception_handler(HTTPException, _unknown_route_response)


async def _error_response(call: Call, error: Any) -> JSONResponse:
    if error.status >= 500:
        call.scope.setdefault("state", {}).setdefault("fault", error.body["error"]["code"] or "failed")  # for the log
    return JSONResponse(error.body, error.status, error.headers)


async def _unknown_route_response(call: Call, error: Any) -> JSONResponse:
    no_route = error.status_code in (404, 405)
    message = f"there is no {call.method} {call.url.path:.80} here" if no_route else str(error.detail)
    return JSONResponse(error_body(message, INVALID), error.status_code, error.headers)
