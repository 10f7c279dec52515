"""The OpenAPI 3.1 document of the routes: every status, header and type that there is."""

from __future__ import annotations

from typing import Any

from imaging.vocabulary import ContentType
from registry.profiles import NEGATIVE, POSITIVE
from services.assessments import ASSESSMENT, describe_assessments
from services.findings import NOTICE
from services.job_schemas import JOB, describe_jobs
from services.registry_routes import describe_actions

TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
NOTED = {"type": "string", "const": NOTICE}
ENCODED = {
    "encoding": {"enum": [f"{ContentType.PNG};base64", f"{ContentType.NPY};base64"]},
    "data": {"type": "string", "contentEncoding": "base64"},
}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """An object that has these properties and no others."""
    required = [name for name in properties if name not in optional]
    closed = {"required": required, "properties": properties, "additionalProperties": False}
    return {"type": "object", **closed, **more}


def _map(of: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": of, **more}


PROBLEM = _object(
    {
        "type": {"type": "string", "description": "/problems/<name>"},
        "title": TEXT,
        "status": WHOLE,
        "detail": {"type": "string", "description": "what is wrong, and the fix"},
        "request_id": TEXT,
    }
)
LABELS = {"labels": _map(TEXT, description="the name of each label")}
RUNS = {
    "encoding": {"const": "rle"}, "shape": {"type": "array", "items": WHOLE},
    "runs": {"type": "array", "items": {"type": "array", "items": WHOLE, "minItems": 2, "maxItems": 2},
             "description": "label and pixels, row by row"},
}  # fmt: skip
TOLD = {
    "id": {"type": "string", "format": "uuid", "description": "of the journal's row"},
    "request_id": TEXT,
    "task": TEXT,
    "model": {"type": "string", "description": "the task's registered model"},
    "version": WHOLE,
    "package": {"type": "string", "description": "sha256 digest of the package"},
    "engine": {"type": "string", "examples": ["openvino/f32"]},
    "site": TEXT,
    "notice": NOTED,
}
FOUND = {
    "probabilities": _map(NUMBER, description="of each class"),
    "positive": {
        "type": ["boolean", "null"],
        "description": "probability at or above the threshold; null where the answer abstains",
    },
    "threshold": NUMBER,
    "probability": {"type": "number", "description": "detection: of the most certain lesion"},
    "lesions": {
        "type": "array",
        "items": _object(dict.fromkeys(("row", "column", "height", "width", "score"), NUMBER)),
        "description": "detection: centre and size in pixels, and score",
    },
    "mask": {
        "type": "object",
        "oneOf": [_object(ENCODED | LABELS), _object(RUNS | LABELS)],
        "description": "8 bit PNG (of a volume .npy) in base64, or runs; and the name of each label",
    },
    "area_px": _map(WHOLE),
    "area_mm2": _map(NUMBER),
    "heat": {
        "anyOf": [_object(ENCODED), {"type": "null"}],
        "description": "with ?heat=1: PNG (of a volume .npy) in base64",
    },
    "heat_withheld": {"type": "string", "description": "why the heat map is not shown: its audit failed"},
    "uncertainty": {"type": "number", "description": "mean entropy in nats"},
    "profile": {"type": "integer", "description": "number of the site's profile that the answer follows"},
    "abstained": {
        "type": "boolean",
        "description": "the prediction set is not one class: nothing is decided",
    },
    "prediction_set": {"type": "array", "items": {"enum": [NEGATIVE, POSITIVE]}},
    "guarantee": {"type": "string", "description": "what is promised of the prediction sets"},
}
ANSWER = _object(TOLD | FOUND, tuple(FOUND))
MODELS = _object({
    "models": {"type": "array", "items": _object({
        **dict.fromkeys(("task", "title", "package", "engine", "modality", "kind", "intended_use"), TEXT),
        "version": WHOLE, "shape": {"type": "array", "items": WHOLE}, "simulated": TEXT,
        **{name: {"type": "array", "items": TEXT} for name in ("classes", "limits", "sites")},
    })},
    "notice": NOTED,
})  # fmt: skip
REFUSALS = {
    "400": "no X-Site header, a damaged file, another query, or no number of milliseconds",
    "403": "a site that is not in sites.yaml, or another one than the credential's",
    "404": "no such task",
    "406": "no answer has a form that Accept asks for",
    "408": "the body did not arrive within 30 s",
    "413": "over 32 MiB, or over 4096 x 4096 pixels",
    "415": "a type or encoding that is not taken",
    "422": "wrong modality, shape or spacing; NaN or infinity",
    "429": "an answer could not be there in time, the site's quota is spent, or too many bodies come",
    "503": "no version approved for the site, loading, stopping, or the journal cannot be written",
    "504": "the deadline passed before an engine was free",
}
EVERYWHERE = {"500": "a fault of the service, without details"}
GUARDED = {
    "401": "access control is on, and the request has no credential, or none that is believed",
    "503": "who may come in cannot be read",
}
OPEN = ("/livez", "/readyz")
ANYBODY: list[dict[str, list[str]]] = [{}, {"key": []}, {"token": []}]
HEADERS = {
    "401": ("WWW-Authenticate", TEXT),
    "429": ("Retry-After", {"type": "integer", "minimum": 1}),
    "503": ("Retry-After", {"type": "integer", "minimum": 1}),
}


def describe_api(tasks: tuple[str, ...], sites: tuple[str, ...]) -> dict[str, Any]:
    """The document, with the tasks and sites of this service."""
    task = _parameter("task", {"type": "string", "enum": list(tasks)}, "what is asked", "path")
    site = _parameter("X-Site", {"type": "string", "enum": list(sites)}, "where the image comes from; "
                      "needed where no credential tells it")  # fmt: skip
    paths: dict[str, Any] = {
        "/v1/models/{task}/predict": {"post": _predict(task, site)},
        "/v1/models": {"get": _get("What serves where", "application/json", MODELS)},
        "/livez": {"get": _get("The process runs", "text/plain")},
        "/readyz": {"get": _get("An approved version is loaded", "text/plain", {}, {"503": "none is"})},
        "/metrics": {"get": _get("Prometheus metrics", "text/plain")},
        "/openapi.json": {"get": _get("This document", "application/json", {"type": "object"})},
        "/docs": {"get": _get("This document for people", "text/html")},
        **describe_jobs(task, site),
        **describe_assessments(site),
        **describe_actions(),
    }
    for path, operations in paths.items():
        for operation in operations.values():
            _complete(path, operation)
    key, token = (
        {"type": "http", "scheme": "bearer", "bearerFormat": form} for form in ("fk_ID_SECRET", "JWT")
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Formulary",
            "version": "1",
            "description": "Imaging models by site. Research use only. Another path is answered 404, another "
            "method 405, as a problem; what is no HTTP 400, by the server, as text.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Problem": PROBLEM, "Answer": ANSWER, "Job": JOB, "Assessment": ASSESSMENT},
            "securitySchemes": {"key": key, "token": token},
        },
    }


def _predict(task: dict[str, Any], site: dict[str, Any]) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    milliseconds = {"type": "integer", "minimum": 1, "maximum": 600_000}
    headers = {
        "Server-Timing": "ms of each stage",
        "X-Answer": "JSON: the answer, where the body is its mask",
    }
    return {
        "summary": "Answer one image",
        "description": "The body is the file itself. The answer's row is in the journal before it is sent. "
        "Accept application/json;mask=rle asks for the mask as runs.",
        "parameters": [
            task,
            site,
            _parameter("X-Request-ID", TEXT, "comes back in answer and journal, if it is plain"),
            _parameter("X-Subject", TEXT, "kept as a keyed pseudonym only"),
            _parameter("X-Study", TEXT, "a canary answers whole studies; kept nowhere"),
            _parameter("X-Deadline-Ms", milliseconds, "how long the answer is wanted; 30 s unless told"),
            _parameter("heat", {"enum": [0, 1]}, "1 adds the heat map, if it was audited", "query"),
            _parameter("explain", {"const": "cam"}, "the same as heat=1", "query"),
        ],
        "requestBody": {"required": True, "content": {str(kind): binary for kind in ContentType}},
        "responses": {
            "200": {
                "description": "the answer; of a segmentation, if it is asked for, the mask as a file",
                "headers": {name: {"schema": TEXT, "description": about} for name, about in headers.items()},
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}},
                    "image/png": binary,
                    "application/x-nifti": binary,
                },
            },
            **REFUSALS,
        },
    }


def _parameter(name: str, schema: dict[str, Any], about: str, where: str = "header") -> dict[str, Any]:
    told = {"name": name, "in": where, "required": where == "path", "schema": schema}
    return {**told, "description": about}


def _get(
    summary: str, kind: str, schema: Any = None, problems: dict[str, str] | None = None
) -> dict[str, Any]:
    answer = {"description": summary, "content": {kind: {"schema": schema or TEXT}}}
    return {"summary": summary, "responses": {"200": answer, **(problems or {})}}


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Add what holds of every route; a refusal that is told in words alone becomes a problem."""
    guarded = path not in OPEN
    told = {**EVERYWHERE, **(GUARDED if guarded else {}), **operation["responses"]}
    operation["responses"] = {
        status: _problem(status, about) if isinstance(about, str) else about
        for status, about in sorted(told.items())
    }
    if guarded:
        operation.setdefault("security", ANYBODY)


def _problem(status: str, about: str) -> dict[str, Any]:
    headers = dict([("X-Request-ID", TEXT), *([HEADERS[status]] if status in HEADERS else [])])
    return {
        "description": about,
        "headers": {name: {"schema": schema, "required": True} for name, schema in headers.items()},
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
