"""The qualify stage: every engine on the golden cases, and the real route with every kind of file."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places, read_sites
from imaging.errors import FormularyError, TrustError
from imaging.manifest import Pixels, read_manifest
from imaging.preparation import prepare
from imaging.reading import decode
from imaging.recipe import QualifySection, TaskSection
from imaging.vocabulary import Kind, Split
from registry.engines import check_answers, measure_parity, open_engine
from registry.package import Contract, digest_package, read_contract, read_golden
from services.findings import encode, lossless_types
from services.routes import Routes
from services.slots import Served, Slots, load_package

CASES = 4


def qualify(places: Places, task: str, section: TaskSection) -> dict[str, Any]:
    """Check a package and write qualification.json; how fast it was goes to var/host, since it is the host's.

    Returns:
        The body of the qualification statement: the same bytes in every run on one kind of machine.

    Raises:
        TrustError: no engine keeps the contract's tolerance, or the route answers otherwise than the engine.
    """
    package = places.stage(task, "package")
    contract = read_contract(package)
    engines, speed = check_engines(package, contract, section.qualify)
    passed = [name for name, told in engines.items() if told["passed"]]
    if not passed:
        raise TrustError(
            f"No engine answers the golden cases of {task} as promised: {engines}.", "Export it again."
        )
    endpoint = asyncio.run(check_route(places, task, passed[0]))
    body = {
        "package": digest_package(package), "golden": len(read_golden(package).images),
        "engines": engines, "best": passed[0], "endpoint": endpoint,
    }  # fmt: skip
    folder = places.stage(task, "qualify")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qualification.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    host = places.var / "host"
    host.mkdir(parents=True, exist_ok=True)
    (host / f"{task}.json").write_text(
        json.dumps({"package": body["package"], "ms_per_batch": speed}, indent=1) + "\n"
    )
    return {**body, "ms_per_batch": speed}


def check_engines(
    package: Path, contract: Contract, section: QualifySection
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Parity and speed of each engine.

    Returns:
        engine -> difference (largest over batch sizes), tolerance, passed, and why not; and engine -> batch
        size -> ms.
    """
    told, speed = {}, {}
    for name in section.engines:
        try:
            told[name], speed[name] = _check_engine(package, contract, name, section.batch_sizes)
        except FormularyError as error:
            told[name] = {"passed": False, "reason": error.fact}
    return told, speed


def _check_engine(
    package: Path, contract: Contract, name: str, sizes: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, float]]:
    kind, _, precision = name.partition("/")
    engine = open_engine(package, kind, precision)
    worst = max(measure_parity(engine, package, contract, size) for size in sizes)
    shape = contract.shape
    for edge in (np.zeros(shape), np.full(shape, 1.5), np.full(shape, -1.5)):
        check_answers(engine.run(np.stack([edge, edge]).astype(np.float32)), contract, 2)
    tolerance = contract.tolerance.get(name, 0.0)
    speed = {}
    for size in sizes:
        batch = np.zeros((size, *shape), np.float32)
        engine.run(batch)
        start = time.perf_counter()
        for _ in range(5):
            engine.run(batch)
        speed[str(size)] = round(200 * (time.perf_counter() - start), 3)
    # Rounded up to one digit: the last bits of a difference depend on the machine, the verdict does not.
    return {"difference": _round_up(worst), "tolerance": tolerance, "passed": worst <= tolerance}, speed


def _round_up(value: float) -> float:
    return float(10 ** np.ceil(np.log10(value))) if value > 0 else 0.0


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
        application = Routes(Places(root=places.root, build=places.build, var=scratch), slots).build()
        transport = httpx.ASGITransport(app=application)
        async with httpx.AsyncClient(transport=transport, base_url="http://qualify") as client:
            for pixels, spacing in _validation_pixels(places, task):
                await _check_case(client, served, (pixels, spacing, site))
    finally:
        served.batches.close()
        shutil.rmtree(scratch)
    kinds = [str(kind) for kind in lossless_types(np.empty(served.contract.stored_shape, np.uint8))]
    return {"cases": CASES, "content_types": kinds, "equal": True}


class FixedSlots(Slots):
    """A table that no ledger moves: one package at one site."""

    def __init__(self, places: Places, table: dict[tuple[str, str], Served]) -> None:
        super().__init__(places)
        self.table, self._generation = table, 0


def _validation_pixels(places: Places, task: str) -> list[tuple[NDArray[Any], float]]:
    table = read_manifest(places.stage(task, "split") / "manifest.parquet")
    rows = table[table["split"] == str(Split.VALIDATION)].head(CASES)
    shards = Pixels(places.stage(task, "cohort"))
    facts = rows[["image", "row", "spacing_mm"]].to_dict("records")
    return [(shards.read(fact["image"], fact["row"]), float(fact["spacing_mm"])) for fact in facts]


async def _check_case(client: Any, served: Served, case: tuple[NDArray[Any], float, str]) -> None:
    pixels, spacing, site = case
    contract = served.contract
    direct = served.batches.submit(prepare(pixels.astype(np.float32), contract.preparation)).result()
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
