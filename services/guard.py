"""What is asked of a request before its body is looked at: a site, a type on the list, a bounded size."""

from __future__ import annotations

import time

from starlette.requests import ClientDisconnect, Request

from imaging.config import Sites
from imaging.errors import SiteRequired, TooLarge, Unreadable, WrongType
from imaging.vocabulary import ContentType

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
