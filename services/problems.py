"""Errors as RFC 9457 problems: the only place that knows HTTP statuses."""

from __future__ import annotations

import logging
import re
import traceback
import uuid
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from imaging import errors
from imaging.errors import FormularyError
from monitoring import telemetry

LOG = logging.getLogger(__name__)
STATUS: dict[type[FormularyError], int] = {
    errors.UnknownTask: 404,
    errors.TooLarge: 413,
    errors.WrongType: 415,
    errors.Unreadable: 400,
    errors.WrongModality: 422,
    errors.WrongShape: 422,
    errors.NotFinite: 422,
    errors.ImageError: 422,
    errors.SiteRequired: 400,
    errors.UnknownSite: 403,
    errors.NotApproved: 503,
    errors.NotReady: 503,
    errors.JournalDown: 503,
    errors.ServingError: 503,
    errors.TrustError: 503,
    errors.Conflict: 409,
    errors.Forbidden: 403,
    errors.UnknownVersion: 404,
    errors.Refused: 409,
    errors.RegistryError: 409,
    errors.ConfigError: 500,
    errors.DataError: 500,
    FormularyError: 500,
}
RETRY_AFTER_S = {503: "5"}


def name_problem(error: FormularyError) -> str:
    """The last part of a problem's type: WrongShape is `wrong-shape`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()


def request_id(request: Request) -> str:
    """The caller's X-Request-ID when it is plain, else a new one; the same for the whole request."""
    if not hasattr(request.state, "request_id"):
        given = request.headers.get("x-request-id", "")
        plain = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given)
        request.state.request_id = given if plain else uuid.uuid4().hex
    return str(request.state.request_id)


def answer_problem(request: Request, error: FormularyError) -> Response:
    """A refusal as problem+json, counted."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    return _problem(request, (status, name_problem(error), error.title), f"{error.fact} {error.fix}".strip())


def answer_http(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the same shape."""
    status = int(getattr(error, "status_code", 500))
    titles = {404: ("not-found", "No such page"), 405: ("wrong-method", "Not this method")}
    name, title = titles.get(status, ("http", "The request cannot be answered"))
    return _problem(request, (status, name, title), "See /docs for the routes.")


def answer_unexpected(request: Request, error: Exception) -> Response:
    """A fault of ours: logged by type and place; an error's own words may quote what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-8:]))
    LOG.error("request %s failed: %s at %s", request_id(request), type(error).__name__, where)
    return _problem(
        request,
        (500, "internal", "A fault of the service"),
        "It was logged. Try again, or report the request id.",
    )


def _problem(request: Request, kind: tuple[int, str, str], detail: str) -> Response:
    status, name, title = kind
    telemetry.REFUSALS.labels(name).inc()
    body: dict[str, Any] = {
        "type": f"/problems/{name}", "title": title, "status": status, "detail": detail,
        "request_id": request_id(request),
    }  # fmt: skip
    headers = {"X-Request-ID": request_id(request)}
    if status in RETRY_AFTER_S:
        headers["Retry-After"] = RETRY_AFTER_S[status]
    return Response(orjson.dumps(body), status, headers, "application/problem+json")
