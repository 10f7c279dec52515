"""What a reader says of an answer, over HTTP. A site judges its own answers and sees no others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from imaging.config import Places, explain
from imaging.errors import Unreadable
from imaging.recipe import Section
from imaging.vocabulary import Judged
from monitoring.journal import Journal
from monitoring.labels import READER, REASON, Door, Judgement
from monitoring.records import Assessment, open_records
from services import guard
from services.findings import NOTICE
from services.job_routes import SiteOf

PATH = "/v1/predictions/{number}/assessment"
MOST_BYTES = 16 * 2**10
KEPT = ("seq", "at", "prediction", "task", "version", "source", "verdict", "truth", "reason", "reader")
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


class Said(Section):
    """The body of an assessment.

    Attributes:
        verdict: accepted: the answer's finding is right; rejected: it is wrong; corrected: it is another one;
            labelled: the truth came from elsewhere.
        truth: 1 positive, 0 negative; of an accepted or rejected answer it follows, a mask has none.
        reason: in a sentence; nothing of the patient.
        reader: who says so; a pseudonym is kept.
    """

    verdict: Judged
    truth: int | None = Field(default=None, ge=0, le=1, strict=True)
    reason: str = Field(default="", max_length=REASON)
    reader: str = Field(default="", max_length=READER)


def make_assessment_routes(
    places: Places, journal: Journal, site_of: SiteOf, spend: Callable[[str], None]
) -> list[Route]:
    """The routes of assessments.

    Args:
        places: where packages, keys and the ledger lie.
        journal: of the answers.
        site_of: headers and the client's address -> site.
        spend: takes an assessment off its site's quota.
    """
    routes = AssessmentRoutes(Door(places, journal, open_records(places.var)), site_of, spend)
    return [Route(PATH, routes.assess, methods=["POST"]), Route(PATH, routes.show, methods=["GET"])]


class AssessmentRoutes:
    """What `make_assessment_routes` mounts."""

    def __init__(self, door: Door, site_of: SiteOf, spend: Callable[[str], None]) -> None:
        self._door, self._site_of, self._spend = door, site_of, spend

    async def assess(self, request: Request) -> Response:
        """Keep what somebody says: 201, or 200 where it was said before."""
        site, number = self._site(request), request.path_params["number"]
        headers = guard.read_headers(request.scope)
        self._spend(site)
        said = _read(await guard.read_body(request.receive, headers, limit=MOST_BYTES))
        told = Judgement(number, said.verdict, said.truth, said.reason, said.reader)
        kept, new = await asyncio.to_thread(self._door.keep, site, [told])
        return _answer(request, _show(kept[0]), 201 if new else 200)

    async def show(self, request: Request) -> Response:
        """What was said of an answer, the newest 50, oldest first."""
        site, number = self._site(request), request.path_params["number"]
        rows = await asyncio.to_thread(self._door.list_judgements, site, number)
        return _answer(request, {"prediction": number, "assessments": [_show(row) for row in rows]})

    def _site(self, request: Request) -> str:
        client = request.scope.get("client") or ("",)
        return self._site_of(guard.read_headers(request.scope), str(client[0]))


def describe_assessments(site: dict[str, Any]) -> dict[str, Any]:
    """The paths of these routes for the OpenAPI document; a refusal is told in words alone."""
    number = {
        "name": "number",
        "in": "path",
        "required": True,
        "schema": TEXT,
        "description": "of the answer",
    }
    schema = {"$ref": "#/components/schemas/Assessment"}
    listed = {"type": "object", "required": ["prediction", "assessments", "notice"], "properties": {
        "prediction": TEXT, "assessments": {"type": "array", "items": schema}, "notice": NOTED,
    }, "additionalProperties": False}  # fmt: skip
    content = {"application/json": {"schema": Said.model_json_schema()}}
    seen = {"400": "no X-Site header", "403": "another site", "404": "the site has no such answer"}
    wrong = {
        "400": "no X-Site header, or a body that is no such object", "408": "the body did not arrive in time",
        "413": f"over {MOST_BYTES // 2**10} KiB",
        "422": "a truth that contradicts the verdict, or that a correction or label lacks; an image of a "
               "locked test set; over 100 assessments of the answer",
        "429": "the site asks more often than its quota",
    }  # fmt: skip
    parameters = [number, site]
    return {PATH: {
        "post": {
            "summary": "Say what an answer is worth", "parameters": parameters,
            "requestBody": {"required": True, "content": content},
            "responses": {"200": _body("said before", schema), "201": _body("kept", schema), **seen, **wrong},
        },
        "get": {
            "summary": "What was said of an answer", "parameters": parameters,
            "responses": {"200": _body("the newest 50, oldest first", listed), **seen},
        },
    }}  # fmt: skip


NOTED = {"type": "string", "const": NOTICE}
ASSESSMENT = {
    "type": "object",
    "required": [*KEPT],
    "properties": {
        **dict.fromkeys(KEPT, TEXT), "seq": WHOLE, "version": WHOLE, "verdict": {"enum": list(Judged)},
        "truth": {"enum": [0, 1, None], "description": "null where nobody says"},
        "reader": {"type": "string", "description": "a pseudonym"}, "notice": NOTED,
    },
    "additionalProperties": False,
}  # fmt: skip


def _body(about: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _read(body: bytes) -> Said:
    fix = "Send JSON: verdict, and if wanted truth, reason, reader."
    try:
        return Said.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise Unreadable("The body is not JSON.", fix) from error
    except ValidationError as error:
        raise Unreadable(f"The body is wrong: {explain(error, Said)[:300]}.", fix) from error


def _show(row: Assessment) -> dict[str, Any]:
    return {name: getattr(row, name) for name in KEPT}


def _answer(request: Request, told: dict[str, Any], status: int = 200) -> Response:
    headers = {"X-Request-ID": guard.request_id(request)}
    return Response(orjson.dumps({**told, "notice": NOTICE}), status, headers, "application/json")
