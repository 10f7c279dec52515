"""Jobs over HTTP: asked for with a file, looked at, fetched, cancelled. A site sees its own and no others."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from imaging.config import Places
from imaging.errors import NotAcceptable, NotReady, ServingError, TooLarge, TooSlow, Unreadable, WrongType
from imaging.reading import measure_volume
from imaging.vocabulary import ContentType, JobKind, JobState, Method
from monitoring import telemetry
from monitoring.journal import pseudonym
from registry.package import Contract
from services import guard
from services.findings import NOTICE, take
from services.jobs import Job, Jobs, miss_job, now
from services.volumes import MAX_BYTES, MAX_VOXELS, check_volume

UPLOAD_S = 600.0
PART_BYTES = 2**20
VOLUMES = (ContentType.NIFTI, ContentType.NPY)
LIMITS = {JobKind.VOLUME: MAX_BYTES, JobKind.EXPLANATION: guard.MAX_BODY_BYTES}
FILES: dict[JobKind, dict[str, str]] = {
    JobKind.VOLUME: {
        "application/x-nifti": "mask.nii.gz", "application/x-npy": "mask.npy",
        "application/json": "mask.json", "application/json;mask=rle": "mask.json",
    },
    JobKind.EXPLANATION: {
        "application/json": "heat.json", "image/png": "heat.png", "application/x-npy": "heat.npy",
    },
}  # fmt: skip
Find = Callable[[str, str], Any]
SiteOf = Callable[[guard.Headers, str], str]


def make_job_routes(places: Places, jobs: Jobs, find: Find, site_of: SiteOf) -> list[Route]:
    """The routes of jobs.

    Args:
        places: for the sites' keys of pseudonyms.
        jobs: started and stopped by the caller.
        find: task and site -> what serves there, with its contract; raises where nothing does.
        site_of: headers and the client's address -> site.
    """
    routes = JobRoutes(places, jobs, find, site_of)
    models, one = "/v1/models/{task}", "/v1/jobs/{number}"
    return [
        Route(f"{models}/volumes", partial(routes.ask, kind=JobKind.VOLUME), methods=["POST"]),
        Route(f"{models}/explanations", partial(routes.ask, kind=JobKind.EXPLANATION), methods=["POST"]),
        Route(one, routes.status, methods=["GET"]),
        Route(one, routes.cancel, methods=["DELETE"]),
        Route(f"{one}/result", routes.result, methods=["GET"]),
    ]  # fmt: skip


class JobRoutes:
    """What `make_job_routes` mounts."""

    def __init__(self, places: Places, jobs: Jobs, find: Find, site_of: SiteOf) -> None:
        self._places, self._jobs, self._find, self._site_of = places, jobs, find, site_of

    async def ask(self, request: Request, kind: JobKind) -> Response:
        """Take a file; the 202 leaves when the job is durable."""
        headers, task, site = (
            guard.read_headers(request.scope),
            request.path_params["task"],
            self._site(request),
        )
        if not self._jobs.accepting:
            raise NotReady("The service is stopping.", "Ask again in a few seconds.")
        contract: Contract = self._find(task, site).contract
        form, method = _read_form(headers, kind), _read_method(request, kind)
        declared = headers.get(b"content-length", b"")
        size = int(declared) if declared.isdigit() else LIMITS[kind]
        if size > LIMITS[kind]:
            raise TooLarge(f"The body is over {LIMITS[kind] // 2**20} MiB.", "Send a smaller one.")
        draft = await asyncio.to_thread(self._jobs.store.draft, site, size)
        try:
            image = await _receive(request, draft / "body", size)
            subject = await asyncio.to_thread(_look, draft / "body", form, contract, kind)
            subject = headers.get(b"x-subject", b"").decode("latin-1") or subject
            job = Job(
                id=str(uuid.uuid4()), kind=kind, task=task, site=site, request_id=guard.request_id(request),
                form=form, method=method, image=image, created=now(),
                subject=pseudonym(self._places.var, site, subject[:256]) if subject else None,
            )  # fmt: skip
            await asyncio.to_thread(self._jobs.store.admit, job, draft)
        except OSError as error:
            raise ServingError(
                "The body cannot be kept: the disk is full or away.", "Ask again later."
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # it is not there any more where the job was taken
        self._jobs.wake()
        telemetry.JOBS.labels(task, kind).inc()
        return _tell(request, job, 202)

    async def status(self, request: Request) -> Response:
        """How a job goes."""
        return _tell(request, await self._read(request))

    async def result(self, request: Request) -> Response:
        """What a job made, in the accepted form; of a heat map that is withheld, the reason as JSON."""
        job = await self._read(request)
        accept = request.headers.get("accept", "").replace(" ", "").lower()
        files = FILES[job.kind]
        usual = dict.fromkeys(("", "*/*", "application/*"), next(iter(files.values())))
        known = (({**usual, **files}).get(wanted.split(";q=")[0]) for wanted in accept.split(","))
        name = next(filter(None, known), None)
        if name is None:
            raise NotAcceptable(f"No result comes as {accept[:60]!r}.", f"Accept {', '.join(files)}.")
        path = await asyncio.to_thread(self._jobs.store.result, job, name)
        if not path.exists():
            path = path.with_name("heat.json")
        if not path.exists():
            raise miss_job(job.id)
        media = next(kind for kind, file in files.items() if file == path.name)
        return FileResponse(path, media_type=media, filename=f"{job.id}.{path.name.partition('.')[2]}",
                            headers={"X-Request-ID": guard.request_id(request)})  # fmt: skip

    async def cancel(self, request: Request) -> Response:
        """Erase a finished job at once; another one is left by the worker between two batches."""
        job = await self._read(request)
        await asyncio.to_thread(self._jobs.store.cancel, job)
        self._jobs.wake()
        return _tell(request, job, 202)

    def _site(self, request: Request) -> str:
        client = request.scope.get("client") or ("",)
        return self._site_of(guard.read_headers(request.scope), str(client[0]))

    async def _read(self, request: Request) -> Job:
        number, site = request.path_params["number"], self._site(request)
        plain = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", number)
        job = await asyncio.to_thread(self._jobs.store.read, number) if plain else None
        if job is None or job.site != site:
            raise miss_job(number)
        return job


def _read_form(headers: guard.Headers, kind: JobKind) -> str:
    form = guard.read_content_type(headers)
    if kind is JobKind.VOLUME and form not in VOLUMES:
        raise WrongType(f"{form} holds no volume.", f"Send {' or '.join(VOLUMES)}.")
    return form


def _read_method(request: Request, kind: JobKind) -> str:
    asked = dict(request.query_params)
    method = asked.pop("method", str(Method.OCCLUSION)) if kind is JobKind.EXPLANATION else ""
    if asked or (method and method not in tuple(Method)):
        raise Unreadable("The query is not known.", f"Ask /explanations?method={'|'.join(Method)}.")
    if method == Method.GRADIENT and find_spec("torch") is None:
        raise WrongType(
            "This installation has no torch, which a gradient needs.", "Ask with method=occlusion."
        )
    return method


async def _receive(request: Request, path: Path, limit: int) -> str:
    """Write a body to the disk as it comes; its sha256."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        async with asyncio.timeout(UPLOAD_S):
            with os.fdopen(number, "wb") as stream:
                return await _pour(request, stream, limit)
    except TimeoutError as error:
        raise TooSlow(f"The body did not arrive within {UPLOAD_S:.0f} s.", "Send it faster.") from error
    except ClientDisconnect as error:
        raise Unreadable("The body broke off.", "Send the whole file.") from error


async def _pour(request: Request, stream: BinaryIO, limit: int) -> str:
    digest, size, part = hashlib.sha256(), 0, bytearray()
    async for piece in request.stream():
        digest.update(piece)
        part += piece
        size += len(piece)
        if size > limit:
            raise TooLarge(f"The body is over {limit // 2**20} MiB.", "Send a smaller one.")
        if len(part) > PART_BYTES:
            await asyncio.to_thread(stream.write, bytes(part))
            part.clear()
    stream.write(part)
    stream.flush()
    await asyncio.to_thread(os.fsync, stream.fileno())
    return digest.hexdigest()


def _look(path: Path, form: str, contract: Contract, kind: JobKind) -> str | None:
    """Refuse at once what can be seen at once: an image whole, a volume by its header; whom it is of."""
    if kind is JobKind.EXPLANATION:
        return take(path.read_bytes(), form, contract).image.subject
    with path.open("rb") as stream:
        shape = measure_volume(stream.read(4096), form)
    if math.prod(shape) > MAX_VOXELS:
        raise TooLarge(f"The volume has {math.prod(shape)} voxels.", f"Send at most {MAX_VOXELS}.")
    check_volume(shape, contract)
    return None


def _tell(request: Request, job: Job, status: int = 200) -> Response:
    place = f"/v1/jobs/{job.id}"
    told = {
        "id": job.id, "kind": job.kind, "task": job.task, "site": job.site, "state": job.state,
        "progress": job.progress, "created": job.created, "attempts": job.attempts, "image": job.image,
        "result": f"{place}/result" if job.state is JobState.DONE else None, "problem": job.problem,
        **job.made, **job.outcome, "notice": NOTICE,
    }  # fmt: skip
    if job.method:
        told["method"] = job.method
    headers = {"X-Request-ID": guard.request_id(request)} | ({"Location": place} if status == 202 else {})
    return Response(orjson.dumps(told), status, headers, "application/json")
