"""What is asked of a request before its body is read, and errors as problem+json: the HTTP statuses."""

from __future__ import annotations

import logging
import re
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from imaging import errors
from imaging.config import Sites
from imaging.errors import FormularyError, SiteRequired, TooLarge, Unreadable, WrongType
from imaging.vocabulary import ContentType
from monitoring import telemetry

MAX_BODY_BYTES = 32 * 2**20
DISCARD_BYTES = 8 * MAX_BODY_BYTES
DISCARD_S = 10.0


def read_site(request: Request, sites: Sites) -> str:
    """The site that asks, from the X-Site header.

    Raises:
        SiteRequired: no header.
        UnknownSite: sites.yaml does not list it.
    """
    name = request.headers.get("x-site", "")
    if not name:
        raise SiteRequired("The request has no X-Site header.", f"Send one of {', '.join(sites.sites)}.")
    sites.site(name)
    return name


def read_content_type(request: Request) -> str:
    """The content type, when it is on the list.

    Raises:
        WrongType: it is not.
    """
    name = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if name not in tuple(ContentType):
        raise WrongType(
            f"Content type {name[:60] or '(none)'!r} is not taken.", f"Send {', '.join(ContentType)}."
        )
    return name


def read_flag(request: Request, name: str) -> bool:
    """A query parameter that is 0 (or absent) or 1.

    Raises:
        Unreadable: it is something else.
    """
    told = request.query_params.get(name, "0")
    if told not in ("0", "1"):
        raise Unreadable(f"The parameter {name} is neither 0 nor 1.", f"Ask with ?{name}=1, or leave it out.")
    return told == "1"


async def read_body(request: Request) -> bytes:
    """The body, within the limit that is held on the header and on what arrives.

    What is too large is thrown away as it comes, bounded too, so that the caller reads the answer.

    Raises:
        TooLarge: over 32 MiB.
        Unreadable: the caller went away.
    """
    parts: list[bytes] = []
    size, stop = 0, time.monotonic() + DISCARD_S
    declared = request.headers.get("content-length", "0")
    too_large = declared.isdigit() and int(declared) > MAX_BODY_BYTES
    try:
        async for part in request.stream():
            size += len(part)
            too_large = too_large or size > MAX_BODY_BYTES
            if too_large and (size > DISCARD_BYTES or time.monotonic() > stop):
                break
            parts.append(part)
            if too_large:
                parts.clear()
    except ClientDisconnect as error:
        raise Unreadable("The body broke off.", "Send the whole file.") from error
    if too_large:
        raise TooLarge(f"The body is over {MAX_BODY_BYTES // 2**20} MiB.", "Send one slice a request.")
    return b"".join(parts)


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
    errors.NotAuthenticated: 401,
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
