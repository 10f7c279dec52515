"""What is asked of a request before its body is read, and how much of a body is taken.

Headers are a dict of lower-case bytes, as ASGI has them; no URL is ever fetched.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from imaging.config import Sites
from imaging.errors import NotAcceptable, Overloaded, SiteRequired, TooLarge, TooSlow, Unreadable, WrongType
from imaging.vocabulary import ContentType, Kind
from monitoring import telemetry
from registry.package import Contract

MAX_BODY_BYTES = 32 * 2**20
DISCARD_BYTES = 8 * MAX_BODY_BYTES
DISCARD_S = 10.0
BODY_S = 30.0
DEADLINE_S = 30.0
CONTENT_TYPES = frozenset(str(kind) for kind in ContentType)
FORMS = {
    "": "", "*/*": "", "application/*": "", "application/json": "", "application/json;mask=rle": "rle",
    "image/png": "png", "application/x-nifti": "nifti",
}  # fmt: skip
MEDIA_TYPES = {"png": "image/png", "nifti": "application/x-nifti"}
Headers = dict[bytes, bytes]


def read_headers(scope: Any) -> Headers:
    """The headers of a request; of one that is sent twice, the last."""
    return dict(scope["headers"])


def read_request_id(headers: Headers) -> str:
    """The caller's X-Request-ID when it is plain, else a new one."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if re.fullmatch(rb"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex


def request_id(request: Request) -> str:
    """The same for Starlette's requests, remembered for the whole request."""
    if not hasattr(request.state, "request_id"):
        request.state.request_id = read_request_id(read_headers(request.scope))
    return str(request.state.request_id)


def read_site(headers: Headers, sites: Sites) -> str:
    """The site that asks, from the X-Site header.

    Raises:
        SiteRequired: no header.
        UnknownSite: sites.yaml does not list it.
    """
    name = headers.get(b"x-site", b"").decode("latin-1")
    if not name:
        raise SiteRequired("The request has no X-Site header.", f"Send one of {', '.join(sites.sites)}.")
    if name not in sites.sites:
        sites.site(name)
    return name


def read_content_type(headers: Headers) -> str:
    """The content type, when it is on the list.

    Raises:
        WrongType: it is not.
    """
    name = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
    if name not in CONTENT_TYPES:
        raise WrongType(
            f"Content type {name[:60] or '(none)'!r} is not taken.", f"Send {', '.join(ContentType)}."
        )
    return name


def read_heat(query: bytes) -> bool:
    """Whether a heat map is asked for: `heat=1`, or `explain=cam`, which is the same.

    Raises:
        Unreadable: one of the two has another value, or another parameter is given.
    """
    wanted = False
    for part in query.decode("latin-1").split("&"):
        if part in ("", "heat=0"):
            continue
        if part not in ("heat=1", "explain=cam"):
            raise Unreadable(
                f"The parameter {part[:40]!r} is not known.",
                "Ask with ?heat=1 or ?explain=cam, or leave it out.",
            )
        wanted = True
    return wanted


def read_form(headers: Headers, contract: Contract) -> str:
    """The form of an answer, by Accept: nothing (JSON, masks as PNG in it), rle, png or nifti.

    Raises:
        NotAcceptable: no answer of this model has that form.
    """
    accept = headers.get(b"accept", b"").decode("latin-1").replace(" ", "").lower()
    forms = (FORMS[name] for wanted in accept.split(",") if (name := wanted.split(";q=")[0]) in FORMS)
    form = next(forms, None)
    if form is None:
        raise NotAcceptable(f"No answer comes as {accept[:60]!r}.", f"Accept {', '.join(list(FORMS)[3:])}.")
    if form in MEDIA_TYPES and contract.kind is not Kind.SEGMENTATION:
        raise NotAcceptable(f"{contract.task} answers no mask.", "Accept application/json.")
    if form == "png" and contract.depth:
        raise NotAcceptable("The mask of a volume is no PNG.", "Accept application/x-nifti or JSON.")
    return form


def read_deadline(headers: Headers) -> float:
    """Until when the answer is wanted (`time.monotonic`), from X-Deadline-Ms; 30 s unless told.

    Raises:
        Unreadable: not 1 to 600000.
    """
    told = headers.get(b"x-deadline-ms")
    if told is None:
        return time.monotonic() + DEADLINE_S
    if not re.fullmatch(rb"[1-9][0-9]{0,5}", told) or int(told) > 600_000:
        raise Unreadable("X-Deadline-Ms is not a number of 1 to 600000.", "Send milliseconds, or nothing.")
    return time.monotonic() + int(told) / 1000


async def read_body(
    receive: Any, headers: Headers, limit: int = MAX_BODY_BYTES, hold: Callable[[int], None] = lambda _: None
) -> bytes:
    """The body, within the limit that is held on the header and on what arrives.

    What is too large is thrown away as it comes, bounded too, so that the caller reads the answer. `hold` is
    told how many bytes are kept of each part that came; it may raise.

    Raises:
        TooLarge: over the limit.
        TooSlow: it did not arrive within 30 s.
        Unreadable: the caller went away.
    """
    declared = headers.get(b"content-length", b"0")
    too_large = declared.isdigit() and int(declared) > limit
    try:
        async with asyncio.timeout(BODY_S):
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and not too_large:
                body: bytes = message.get("body", b"")
            else:
                body = await _gather(receive, message, limit, hold, too_large)
    except TimeoutError as error:
        raise TooSlow(f"The body did not arrive within {BODY_S:.0f} s.", "Send it faster.") from error
    if len(body) > limit:
        raise _refuse_size(limit)
    return body


def _refuse_size(limit: int) -> TooLarge:
    if limit < 2**20:
        return TooLarge(f"The body is over {limit // 2**10} KiB.", "Send less.")
    return TooLarge(f"The body is over {limit // 2**20} MiB.", "Send one slice a request.")


async def _gather(
    receive: Any, message: Any, limit: int, hold: Callable[[int], None], too_large: bool
) -> bytes:
    parts: list[bytes] = []
    size, stop = 0, time.monotonic() + DISCARD_S
    while message["type"] == "http.request":
        size += len(message.get("body", b""))
        too_large = too_large or size > limit
        if too_large:
            parts.clear()
        else:
            parts.append(message.get("body", b""))
            hold(len(parts[-1]))
        if not message.get("more_body") or (too_large and (size > DISCARD_BYTES or time.monotonic() > stop)):
            break
        message = await receive()
    else:
        raise Unreadable("The body broke off.", "Send the whole file.")
    if too_large:
        raise _refuse_size(limit)
    return b"".join(parts)


class Quotas:
    """How much each site may ask: sites.yaml's `per_second`, with as much again saved up for a burst.

    Args:
        sites: of the checkout; a site without `per_second` may ask as much as it likes.
    """

    def __init__(self, sites: Sites) -> None:
        told = {name: site.per_second for name, site in sites.sites.items() if site.per_second}
        self._rates = {name: rate / telemetry.WORKERS for name, rate in told.items()}  # each worker its share
        self._saved = {name: (rate, time.monotonic()) for name, rate in self._rates.items()}

    def spend(self, site: str) -> None:
        """Take one request off a site's quota.

        Raises:
            Overloaded: nothing is left of it.
        """
        rate = self._rates.get(site)
        if rate is None:
            return
        saved, since = self._saved[site]
        now = time.monotonic()
        saved = min(max(rate, 1.0), saved + rate * (now - since))
        self._saved[site] = (saved - 1 if saved >= 1 else saved, now)
        if saved < 1:
            fact = f"{site} may ask {rate * telemetry.WORKERS:g} times a second."
            fix = "Ask more slowly; see per_second in sites.yaml."
            raise Overloaded(fact, fix, retry_s=(1 - saved) / rate)
