"""The registry over HTTP: each action of `registry.actions` is one route with its meaning and its errors.

Every route asks for a token (JWT, ES256) of an issuer in roles.yaml; without one the answer is 401.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from imaging.config import Places, explain
from imaging.errors import NotAuthenticated, Unreadable
from registry.access import Acting, act_by_token
from registry.actions import ACTIONS, Action, perform
from registry.ledger import Ledger, open_ledger
from services.guard import read_body, read_headers, request_id

PREFIX = "/v1/registry"


def make_routes(places: Places) -> list[Route]:
    """GET /v1/registry/NAME for what reads, its arguments in the query; POST for what decides, as JSON."""
    ledger = open_ledger(places.var)
    return [
        Route(f"{PREFIX}/{action.name}", _answer(places, ledger, action), methods=[_method(action)])
        for action in ACTIONS.values()
    ]


def describe_actions() -> dict[str, Any]:
    """The paths of these routes for the OpenAPI document; a refusal is told in words alone."""
    paths = {}
    for action in ACTIONS.values():
        schema = action.arguments.model_json_schema()
        told: dict[str, Any] = {
            "summary": action.help, "description": f"Scope: {action.scope}.", "security": [{"token": []}],
            "responses": {"200": {"description": "done", "content": {"application/json": {
                "schema": {"type": "object"}}}}} | PROBLEMS,
        }  # fmt: skip
        if action.reads:
            told["parameters"] = [
                {"name": name, "in": "query", "required": name in schema.get("required", []), "schema": one}
                for name, one in schema["properties"].items()
            ]
        else:
            told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[f"{PREFIX}/{action.name}"] = {_method(action).lower(): told}
    return paths


PROBLEMS = {
    "400": "arguments that are not what they must be",
    "401": "no token, or none that is believed",
    "403": "this person may not do it, or a site that is not in sites.yaml",
    "404": "no such task or version",
    "408": "the body did not arrive within 30 s",
    "409": "refused by the gate, or somebody else was first",
    "413": "over 32 MiB",
    "503": "a signature or digest does not hold",
}


def _method(action: Action) -> str:
    return "GET" if action.reads else "POST"


def _answer(places: Places, ledger: Ledger, action: Action) -> Any:
    async def answer(request: Request) -> Response:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise NotAuthenticated("The request has no bearer token.", "Send Authorization: Bearer TOKEN.")
        signer = await asyncio.to_thread(act_by_token, places, ledger, token.strip(), action.scope)
        body = (
            orjson.dumps(dict(request.query_params))
            if action.reads
            else await read_body(request.receive, read_headers(request.scope))
        )
        asked = _read(action, body)
        acting = Acting(places, ledger, signer, getattr(asked, "because", ""))
        told = await asyncio.to_thread(perform, action, acting, asked)
        headers = {"X-Request-ID": request_id(request)}
        return Response(orjson.dumps(told), headers=headers, media_type="application/json")

    return answer


def _read(action: Action, body: bytes) -> Any:
    try:
        return action.arguments.model_validate(orjson.loads(body or b"{}"))
    except orjson.JSONDecodeError as error:
        raise Unreadable("The body is not JSON.", "Send an object.") from error
    except ValidationError as error:
        raise Unreadable(f"{action.name}: {explain(error, action.arguments)}.", "See /docs.") from error
