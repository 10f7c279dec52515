"""The qualify stage: what every engine changes, and the real route with every kind of file."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places, Sites, read_sites
from imaging.errors import TrustError
from imaging.manifest import Pixels, read_manifest
from imaging.preparation import prepare
from imaging.reading import decode
from imaging.recipe import TaskSection
from imaging.vocabulary import Kind, Split
from registry.package import Contract, digest_package, read_contract
from registry.policy import read_policy
from registry.qualified import write_host
from services.agreement import check_engines, choose_best, gather_cases
from services.findings import encode, lossless_types
from services.guard import Quotas
from services.routes import Routes
from services.served import Served, load_package
from services.slots import Slots, Tables

CASES = 4


def qualify(places: Places, task: str, section: TaskSection) -> dict[str, Any]:
    """Check a package and write qualification.json; how fast it was goes to var/host, since it is the host's.

    Returns:
        The body of the qualification statement (the same bytes in every run on one kind of machine), and the
        host's ms_per_batch and best engine.

    Raises:
        TrustError: no engine keeps what contract and policy ask, or the route answers otherwise than it does.
    """
    package = places.stage(task, "package")
    contract, policy = read_contract(package), read_policy(task, places.policies)
    cases = gather_cases(places, task, contract, section.qualify)
    engines, speed = check_engines(package, contract, cases, section.qualify, policy)
    passed = [name for name, told in engines.items() if told["passed"]]
    if not passed:
        raise TrustError(
            f"No engine answers the images of {task} as promised: {engines}.", "Export it again."
        )
    endpoint = asyncio.run(check_route(places, task, passed[0]))
    edges, golden = cases.edges, cases.golden
    body = {
        "package": digest_package(package), "golden": golden, "edges": edges,
        "validation": len(cases.images) - golden - edges, "reference": cases.reference,
        "engines": engines, "passed": passed, "endpoint": endpoint,
    }  # fmt: skip
    folder = places.stage(task, "qualify")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qualification.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    measured = {"ms_per_batch": speed, "best": choose_best(passed, speed)}
    write_host(places.var, {"package": body["package"], **measured})
    return {**body, **measured}


async def check_route(places: Places, task: str, engine: str) -> dict[str, Any]:
    """Send validation images as every kind of file through the real application, and ask for equal answers.

    Raises:
        TrustError: a file's answer differs from the engine's, or is refused.
    """
    import httpx

    scratch = Path(tempfile.mkdtemp(prefix="qualify-"))
    site = read_sites(places).names()[0]
    served = load_package(places.stage(task, "package"), (0, "sha256:" + "0" * 64), engine, {})
    try:
        slots = FixedSlots(Places(root=places.root, build=places.build, var=scratch), {(task, site): served})
        routes = Routes(Places(root=places.root, build=places.build, var=scratch), slots)
        routes.predictor.quotas = Quotas(Sites(sites={}))  # a site's quota is for its own questions
        transport = httpx.ASGITransport(app=routes.build())
        async with httpx.AsyncClient(transport=transport, base_url="http://qualify") as client:
            for pixels, spacing in _validation_pixels(places, task):
                await _check_case(client, served, (pixels, spacing, site))
    finally:
        served.runner.close()
        shutil.rmtree(scratch)
    kinds = [str(kind) for kind in lossless_types(np.empty(served.contract.stored_shape, np.uint8))]
    return {"cases": CASES, "content_types": kinds, "equal": True}


class FixedSlots(Slots):
    """A table that no ledger moves: one package at one site."""

    def __init__(self, places: Places, table: dict[tuple[str, str], Served]) -> None:
        super().__init__(places)
        self.tables = Tables(0, table)


def _validation_pixels(places: Places, task: str) -> list[tuple[NDArray[Any], float]]:
    table = read_manifest(places.stage(task, "split") / "manifest.parquet")
    rows = table[table["split"] == str(Split.VALIDATION)].head(CASES)
    shards = Pixels(places.stage(task, "cohort"))
    facts = rows[["image", "row", "spacing_mm"]].to_dict("records")
    return [(shards.read(fact["image"], fact["row"]), float(fact["spacing_mm"])) for fact in facts]


async def _check_case(client: Any, served: Served, case: tuple[NDArray[Any], float, str]) -> None:
    pixels, spacing, site = case
    contract = served.contract
    direct = served.runner.submit(prepare(pixels.astype(np.float32), contract.preparation)).result().answers
    expected = contract.probabilities(direct.logits)[0]
    for kind in lossless_types(pixels):
        body = encode(pixels, kind, spacing, contract.modality, contract.png_offset)
        headers = {"Content-Type": kind, "X-Site": site}
        answer = await client.post(f"/v1/models/{contract.task}/predict", content=body, headers=headers)
        if answer.status_code != 200 or not _same(answer.json(), expected, contract):
            raise TrustError(
                f"{kind} is answered otherwise than the engine does ({answer.status_code}).",
                "Compare imaging/reading.py and services/findings.py.",
            )


def _same(told: dict[str, Any], expected: NDArray[np.float32], contract: Contract) -> bool:
    if contract.kind is Kind.DETECTION:
        score = float(contract.score(expected[None])[0])
        return bool(np.isclose(told["probability"], score, atol=1e-5))
    if contract.kind is Kind.CLASSIFICATION:
        said = [told["probabilities"][name] for name in contract.classes]
        return bool(np.allclose(said, expected, atol=1e-5))
    labels = expected.argmax(axis=0)
    counts = {name: int((labels == label).sum()) for label, name in enumerate(contract.classes) if label}
    mask = _read_mask(told["mask"]).reshape(labels.shape)
    return bool(told["area_px"] == counts and np.array_equal(mask, labels))


def _read_mask(mask: dict[str, Any]) -> NDArray[Any]:
    body = base64.b64decode(mask["data"])
    kind = str(mask["encoding"]).removesuffix(";base64")
    return decode(body, kind).pixels.astype(int)
