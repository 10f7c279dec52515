"""The OpenAPI 3.1 document of the routes."""

from __future__ import annotations

from typing import Any

from imaging.vocabulary import ContentType
from services.registry_routes import describe_actions

PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "description": "/problems/<name>"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what is wrong, and the fix"},
        "request_id": {"type": "string"},
    },
}
ANSWER = {
    "type": "object",
    "required": ["id", "request_id", "task", "model", "version", "package", "engine", "site", "notice"],
    "properties": {
        "id": {"type": "string", "format": "uuid", "description": "of the journal's row"},
        "request_id": {"type": "string"},
        "task": {"type": "string"},
        "model": {"type": "string", "description": "the task's registered model"},
        "version": {"type": "integer"},
        "package": {"type": "string", "description": "sha256 digest of the package"},
        "engine": {"type": "string", "examples": ["openvino/f32"]},
        "site": {"type": "string"},
        "probabilities": {
            "type": "object",
            "additionalProperties": {"type": "number"},
            "description": "of each class",
        },
        "positive": {"type": "boolean", "description": "probability at or above the threshold"},
        "threshold": {"type": "number"},
        "probability": {"type": "number", "description": "detection: of the most certain lesion"},
        "lesions": {
            "type": "array",
            "items": {"type": "object"},
            "description": "detection: row, column, height, width in pixels, and score",
        },
        "mask": {
            "type": "object",
            "description": "8 bit PNG (of a volume .npy) in base64, and the name of each label",
        },
        "area_px": {"type": "object", "additionalProperties": {"type": "integer"}},
        "area_mm2": {"type": "object", "additionalProperties": {"type": "number"}},
        "heat": {"type": ["object", "null"], "description": "with ?heat=1: PNG (of a volume .npy) in base64"},
        "heat_withheld": {"type": "string", "description": "why the heat map is not shown: its audit failed"},
        "uncertainty": {"type": "number", "description": "mean entropy in nats"},
        "notice": {"type": "string", "const": "research use only"},
    },
}
REFUSALS = {
    "400": "no X-Site header, or a damaged file",
    "403": "a site that is not in sites.yaml",
    "404": "no such task",
    "413": "over 32 MiB",
    "415": "a type or encoding that is not taken",
    "422": "wrong modality, shape or spacing; NaN or infinity",
    "500": "a fault of the service, without details",
    "503": "no version approved for the site, loading, stopping, or the journal cannot be written",
}


def describe_api(tasks: tuple[str, ...], sites: tuple[str, ...]) -> dict[str, Any]:
    """The document, with the tasks and sites of this service."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Formulary",
            "version": "1",
            "description": "Imaging models by site. Research use only.",
        },
        "paths": {
            "/v1/models/{task}/predict": {"post": _predict(tasks, sites)},
            "/v1/models": {"get": _get("What serves where", "application/json")},
            "/livez": {"get": _get("The process runs", "text/plain")},
            "/readyz": {"get": {**_get("An approved version is loaded", "text/plain", "503")}},
            "/metrics": {"get": _get("Prometheus metrics", "text/plain")},
            "/openapi.json": {"get": _get("This document", "application/json")},
            "/docs": {"get": _get("This document for people", "text/html")},
            **describe_actions(),
        },
        "components": {
            "schemas": {"Problem": PROBLEM, "Answer": ANSWER},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _predict(tasks: tuple[str, ...], sites: tuple[str, ...]) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": "Answer one image",
        "description": "The body is the file itself. The answer's row is in the journal before it is sent.",
        "parameters": [
            _parameter("task", "path", {"type": "string", "enum": list(tasks)}, "what is asked"),
            _parameter(
                "X-Site", "header", {"type": "string", "enum": list(sites)}, "where the image comes from"
            ),
            _parameter(
                "X-Request-ID", "header", {"type": "string"}, "comes back in answer and journal", False
            ),
            _parameter("heat", "query", {"enum": [0, 1]}, "1 adds the heat map, if it was audited", False),
            _parameter("X-Subject", "header", {"type": "string"}, "kept as a keyed pseudonym only", False),
        ],
        "requestBody": {"required": True, "content": {str(kind): binary for kind in ContentType}},
        "responses": {
            "200": {"description": "the answer", "content": {"application/json": {"schema": _ref("Answer")}}},
            **{status: _problem(about) for status, about in REFUSALS.items()},
        },
    }


def _parameter(
    name: str, where: str, schema: dict[str, Any], about: str, required: bool = True
) -> dict[str, Any]:
    return {"name": name, "in": where, "required": required, "schema": schema, "description": about}


def _get(summary: str, kind: str, *problems: str) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": summary, "content": {kind: {}}}}
    return {
        "summary": summary,
        "responses": responses | {status: _problem(REFUSALS[status]) for status in problems},
    }


def _problem(about: str) -> dict[str, Any]:
    return {"description": about, "content": {"application/problem+json": {"schema": _ref("Problem")}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
