"""The OpenAPI description of the routes of jobs."""

from __future__ import annotations

from typing import Any

from imaging.vocabulary import ContentType, JobKind, JobState, Method
from services.findings import NOTICE
from services.job_routes import FILES, VOLUMES

JOB = {
    "type": "object",
    "required": ["id", "kind", "task", "site", "state", "progress", "created", "result", "problem", "notice"],
    "properties": {
        "id": {"type": "string", "format": "uuid", "description": "of the job and of the journal's row"},
        "kind": {"enum": list(JobKind)},
        "task": {"type": "string"},
        "site": {"type": "string"},
        "state": {"enum": list(JobState)},
        "progress": {"type": "number", "minimum": 0, "maximum": 1},
        "created": {"type": "string"},
        "attempts": {"type": "integer"},
        "image": {"type": "string", "description": "sha256 of the body"},
        "result": {"type": ["string", "null"], "description": "where to fetch it, once it is done"},
        "problem": {
            "anyOf": [{"type": "object", "required": ["type", "title", "detail"]}, {"type": "null"}],
            "additionalProperties": {"type": "string"},
            "description": "why it failed",
        },
        "version": {"type": "integer"},
        "package": {"type": "string"},
        "engine": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}, "description": "depth, rows, columns"},
        "voxels": {"type": "object", "additionalProperties": {"type": "integer"}},
        "volume_ml": {"type": "object", "additionalProperties": {"type": "number"}},
        "method": {"enum": list(Method)},
        "peak": {"type": "number", "description": "largest value of the heat map"},
        "heat_withheld": {"type": "string"},
        "notice": {"type": "string", "const": NOTICE},
    },
    "additionalProperties": False,
}
ABOUT = {
    "400": "no X-Site, a damaged file, or another query",
    "403": "a site that is not in sites.yaml, or another one than the credential's",
    "404": "no such task, or no such job of this site",
    "406": "no result has a form that Accept asks for",
    "408": "the body came too slowly",
    "409": "the job is not done",
    "413": "over 512 MiB, or 64 Mi voxels; of an image 32 MiB",
    "415": "a type that is not taken",
    "422": "another shape or modality; NaN or infinity",
    "429": "too many jobs, or bytes of them",
    "503": "no version approved for the site, stopping, or no room on the disk",
}


def describe_jobs(task: dict[str, Any], site: dict[str, Any]) -> dict[str, Any]:
    """The paths of these routes for the OpenAPI document; a refusal is told in words alone.

    Args:
        task: the parameter in the path.
        site: the parameter among the headers.
    """
    number = _parameter("number", "path", {"type": "string"}, "of the job")
    method = _parameter("method", "query", {"enum": list(Method)}, "how it is found")
    subject = _parameter("X-Subject", "header", {"type": "string"}, "kept as a keyed pseudonym only")
    asked_by = _parameter("X-Request-ID", "header", {"type": "string"}, "comes back, if it is plain")
    job = {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}}}

    def asking(summary: str, kinds: tuple[ContentType, ...], *more: dict[str, Any]) -> dict[str, Any]:
        binary = {"schema": {"type": "string", "format": "binary"}}
        place = {"Location": {"required": True, "schema": {"type": "string"}, "description": "/v1/jobs/<id>"}}
        return {
            "summary": summary, "parameters": [task, site, asked_by, subject, *more],
            "requestBody": {"required": True, "content": {str(kind): binary for kind in kinds}},
            "responses": {"202": {"description": "the job", "headers": place, "content": job}}
            | _told("400", "403", "404", "408", "413", "415", "422", "429", "503"),
        }  # fmt: skip

    own = {"parameters": [number, site]}
    seen = _told("400", "403", "404")
    made: dict[str, Any] = {kind: {} for files in FILES.values() for kind in files if ";" not in kind}
    return {
        "/v1/models/{task}/volumes": {"post": asking("Segment a volume", VOLUMES)},
        "/v1/models/{task}/explanations": {"post": asking("Explain an answer", tuple(ContentType), method)},
        "/v1/jobs/{number}": {
            "get": {**own, "summary": "How a job goes",
                    "responses": {"200": {"description": "the job", "content": job}} | seen},
            "delete": {**own, "summary": "Cancel a job, or erase what it made",
                       "responses": {"202": {"description": "the job as it was", "content": job}} | seen},
        },
        "/v1/jobs/{number}/result": {"get": {
            **own, "summary": "What a job made, in the form of the Accept header",
            "responses": {"200": {"description": "the mask or the heat map", "content": made}}
            | seen | _told("406", "409"),
        }},
    }  # fmt: skip


def _told(*statuses: str) -> dict[str, str]:
    return {status: ABOUT[status] for status in statuses}


def _parameter(name: str, where: str, schema: dict[str, Any], about: str) -> dict[str, Any]:
    told = {"name": name, "in": where, "required": where == "path", "schema": schema}
    return {**told, "description": about}
