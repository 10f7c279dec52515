"""What the worker makes of a job's body: a mask or a heat map, as files, and what the status tells of it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from imaging.reading import decode, write_like
from imaging.vocabulary import ContentType, JobKind
from registry.engines import Answers, Engine
from registry.package import Contract
from services.explanations import explain
from services.findings import NOTICE, Found, draw_heat, take, write_mask
from services.jobs import Job
from services.volumes import MAX_VOXELS, Step, check_volume, segment

HEADER_BYTES = 4096  # enough of a volume's file to know how it lies


@dataclass(frozen=True)
class Opened:
    """A verified package and its engine; `withheld` says why its heat maps are not shown, if they are not."""

    version: int
    digest: str
    folder: Path
    contract: Contract
    engine: Engine
    withheld: str


@dataclass(frozen=True)
class Made:
    """Files by name, what the status tells (`outcome`), and what the journal keeps (`columns`)."""

    files: dict[str, bytes]
    outcome: dict[str, Any]
    columns: dict[str, float]

    def digest(self) -> str:
        """sha256 of all files, for the journal."""
        told = hashlib.sha256()
        for name in sorted(self.files):
            told.update(self.files[name])
        return told.hexdigest()


Making = Generator[Step, NDArray[np.float32], Made]


def make(job: Job, path: Path, opened: Opened) -> Making:
    """Do a job.

    Args:
        job: what is asked.
        path: the body.
        opened: the package that answers.

    Yields:
        Images for the engine; to be sent their logits.

    Raises:
        ImageError: the body cannot be read, or the model was not made for it.
    """
    making = {JobKind.VOLUME: _make_mask, JobKind.EXPLANATION: _make_heat}[job.kind]
    return making(job, path, opened)


def _make_mask(job: Job, path: Path, opened: Opened) -> Making:
    contract, body = opened.contract, path.read_bytes()
    image, head = decode(body, job.form, contract.png_offset, MAX_VOXELS), body[:HEADER_BYTES]
    del body  # up to 512 MiB that nobody needs any more
    check_volume(image.pixels.shape, contract)
    contract.check_source(image)
    labels = yield from segment(image.pixels, contract)
    if job.form == ContentType.NIFTI:
        file, voxel_mm3 = write_like(labels, head)
    else:
        file, voxel_mm3 = gzip.compress(write_mask(labels, "nifti", None), 1, mtime=0), None
    counts = sum(np.bincount(plane.ravel(), minlength=len(contract.classes)) for plane in labels)
    voxels = dict(zip(contract.classes, np.asarray(counts).tolist(), strict=True))
    outcome: dict[str, Any] = {"shape": list(labels.shape), "voxels": voxels}
    if voxel_mm3 is not None:
        found = list(voxels.items())[1:]
        outcome["volume_ml"] = {name: round(count * voxel_mm3 / 1000, 3) for name, count in found}
    files = {"mask.nii.gz": file, "mask.npy": _npy(labels), "mask.json": _runs(labels, contract)}
    return Made(files, outcome, {f"voxels_{name.replace(' ', '_')}": float(n) for name, n in voxels.items()})


def _runs(labels: NDArray[np.uint8], contract: Contract) -> bytes:
    """Run lengths in row-major order as JSON; a run ends with its slice, so that memory holds one's."""
    planes = (Found({}, {}, plane, contract.classes).show("rle")["mask"] for plane in labels)
    runs = b",".join(orjson.dumps(plane["runs"])[1:-1] for plane in planes)
    names = {str(label): name for label, name in enumerate(contract.classes)}
    head = orjson.dumps({"encoding": "rle", "shape": labels.shape, "labels": names, "notice": NOTICE})
    return head[:-1] + b',"runs":[' + runs + b"]}"


def _make_heat(job: Job, path: Path, opened: Opened) -> Making:
    prepared = take(path.read_bytes(), job.form, opened.contract).prepared
    told: dict[str, Any] = {"method": job.method, "notice": NOTICE}
    if opened.withheld:
        outcome: dict[str, Any] = {"heat_withheld": opened.withheld}
        return Made({"heat.json": orjson.dumps({"heat": None, **outcome, **told})}, outcome, {})
    heat = yield from explain(job.method, prepared, opened.contract, opened.folder)
    heat, outcome = heat.astype(np.float32), {"peak": float(heat.max())}
    shown = draw_heat(Answers(heat[None], heat[None], heat[None]))
    files = {"heat.npy": _npy(heat), "heat.json": orjson.dumps({"heat": shown, **outcome, **told})}
    if heat.ndim == 2:
        files["heat.png"] = base64.b64decode(shown["data"])
    return Made(files, outcome, outcome)


def _npy(values: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()
