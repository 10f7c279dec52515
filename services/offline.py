"""An answer without a server: the ledger's champion, or a version by number, on one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from imaging.config import Places
from imaging.errors import NotApproved, Unreadable, WrongType
from imaging.reading import SUFFIXES
from imaging.vocabulary import Statement
from registry.events import NETWORK
from registry.evidence import verify_package
from registry.ledger import Ledger, open_ledger
from registry.package import shelf
from services.findings import NOTICE, find, take
from services.slots import load_package


def predict_file(
    places: Places, path: Path, task: str, site: str | None, version: int | None
) -> dict[str, Any]:
    """Answer one file as the service would, with everything verified first; nothing is journalled.

    Args:
        places: where the ledger and the packages lie.
        path: a .png, .dcm, .nii, .nii.gz or .npy file.
        task: what to ask.
        site: whose champion answers; None is the network's.
        version: instead of a champion.

    Returns:
        The answer's fields.

    Raises:
        WrongType: no such suffix.
        NotApproved: there is no champion.
        FormularyError: as the service would.
    """
    content_type = SUFFIXES.get(path.suffix.lower())
    if content_type is None:
        raise WrongType(f"{path.name} has no suffix that is known.", f"Use {', '.join(SUFFIXES)}.")
    try:
        body = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror}).", "Name a file.") from error
    ledger = open_ledger(places.var)
    number, digest = _choose(ledger, task, site, version)
    folder = shelf(places.var, digest)
    evidence = verify_package(folder, ledger)
    engine = os.environ.get("FORMULARY_ENGINE", "openvino/f32")
    told = evidence.statements.get(Statement.EVALUATION, {})
    served = load_package(folder, (number, digest), engine, told)
    try:
        taken = take(body, content_type, served.contract)
        answers = served.batches.submit(taken.prepared).result()
    finally:
        served.batches.close()
    found = find(taken, answers, served.contract)
    return {"task": task, "version": number, "package": digest, "engine": served.engine, **found.answer,
            "notice": NOTICE}  # fmt: skip


def _choose(ledger: Ledger, task: str, site: str | None, version: int | None) -> tuple[int, str]:
    if version is not None:
        return version, ledger.version(task, version)[0]
    held = ledger.slots(task).get(site or NETWORK, {}).get("champion")
    if held is None:
        raise NotApproved(
            f"No version of {task} is approved for {site or 'the network'}.",
            "Name one: --version N; or promote one.",
        )
    return held.version, held.digest
