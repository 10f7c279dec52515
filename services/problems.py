"""Errors as problem+json (RFC 9457): the only place that knows HTTP statuses."""

from __future__ import annotations

import logging
import math
import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from imaging import errors
from imaging.errors import FormularyError, NotAuthenticated, Overloaded
from monitoring import telemetry
from services.guard import request_id

LOG = logging.getLogger(__name__)
STATUS: dict[type[FormularyError], int] = {
    errors.UnknownTask: 404,
    errors.TooLarge: 413,
    errors.TooSlow: 408,
    errors.WrongType: 415,
    errors.NotAcceptable: 406,
    errors.Unreadable: 400,
    errors.WrongModality: 422,
    errors.WrongShape: 422,
    errors.NotFinite: 422,
    errors.ImageError: 422,
    errors.SiteRequired: 400,
    errors.UnknownSite: 403,
    errors.NotApproved: 503,
    errors.NotReady: 503,
    errors.Overloaded: 429,
    errors.Expired: 504,
    errors.UnknownJob: 404,
    errors.UnknownPrediction: 404,
    errors.NoResult: 409,
    errors.JournalDown: 503,
    errors.ServingError: 503,
    errors.TrustError: 503,
    errors.Conflict: 409,
    errors.NotAuthenticated: 401,
    errors.Forbidden: 403,
    errors.UnknownVersion: 404,
    errors.Refused: 409,
    errors.RegistryError: 409,
    errors.ConfigError: 500,
    errors.WrongLabel: 422,
    errors.DataError: 500,
    FormularyError: 500,
}
RETRY_AFTER_S = 5
HTTP = {404: ("not-found", "No such page"), 405: ("wrong-method", "Not this method")}


@dataclass(frozen=True)
class Reply:
    """What goes back to the caller, below any framework: status, body, its type, and further headers."""

    status: int
    body: bytes
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)

    async def send(self, send: Any) -> None:
        """Hand it to the ASGI server."""
        head = {"content-type": self.media_type, "content-length": str(len(self.body)), **self.headers}
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in head.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})

    def respond(self) -> Response:
        """The same for Starlette."""
        return Response(self.body, self.status, self.headers, self.media_type)


def name_problem(error: FormularyError) -> str:
    """The last part of a problem's type: WrongShape is `wrong-shape`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()


def tell(error: Exception, number: str) -> Reply:
    """Any error as a problem, counted. One of the house tells fact and fix; another one only that it is ours.

    Args:
        error: what was raised.
        number: of the request.
    """
    if isinstance(error, FormularyError):
        status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
        return _problem(
            (status, name_problem(error), error.title), f"{error.fact} {error.fix}".strip(), number, error
        )
    LOG.error("request %s failed: %s", number, locate(error))
    detail = "It was logged. Try again, or report the request id."
    return _problem((500, "internal", "A fault of the service"), detail, number)


def locate(error: Exception) -> str:
    """An error's type and place; its own words may quote what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-8:]))
    return f"{type(error).__name__} at {where}"


def answer_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of whatever a route raised."""
    return tell(error, request_id(request)).respond()


def answer_http(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the same shape."""
    status = int(getattr(error, "status_code", 500))
    name, title = HTTP.get(status, ("http", "The request cannot be answered"))
    return _problem((status, name, title), "See /docs for the routes.", request_id(request)).respond()


def _problem(kind: tuple[int, str, str], detail: str, number: str, error: Exception | None = None) -> Reply:
    status, name, title = kind
    telemetry.REFUSALS.labels(name).inc()
    body: dict[str, Any] = {
        "type": f"/problems/{name}", "title": title, "status": status, "detail": detail, "request_id": number,
    }  # fmt: skip
    headers = {"x-request-id": number}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_s)))
    elif status == 503:
        headers["retry-after"] = str(RETRY_AFTER_S)
    elif isinstance(error, NotAuthenticated):
        headers["www-authenticate"] = "Bearer"
    return Reply(status, orjson.dumps(body), "application/problem+json", headers)
