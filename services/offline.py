"""An answer without a server: the ledger's champion, or a version by number, on one file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from imaging.config import Places
from imaging.errors import DataError, NotApproved, Unreadable, WrongType
from imaging.reading import SUFFIXES
from imaging.vocabulary import Statement
from monitoring.journal import open_journal
from registry.engines import Answers
from registry.events import NETWORK
from registry.evidence import verify_package
from registry.ledger import Ledger, open_ledger
from registry.package import read_contract, shelf
from registry.profiles import find_numbered
from registry.projection import read_projection
from registry.qualified import choose_engine
from services.findings import NOTICE, find, take
from services.served import load_package, open_package


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
    body, content_type = _read_file(path)
    ledger = open_ledger(places.var)
    number, digest = _choose(ledger, task, site, version)
    folder = shelf(places.var, digest)
    evidence = verify_package(folder, ledger)
    qualification = evidence.statements.get(Statement.QUALIFICATION, {})
    asked = os.environ.get("FORMULARY_ENGINE", "")
    engine = choose_engine(places.var, read_contract(folder), qualification, asked)
    told = evidence.statements.get(Statement.EVALUATION, {})
    served = load_package(folder, (number, digest), engine, told)
    try:
        taken = take(body, content_type, served.contract)
        answers = served.runner.submit(taken.prepared).result().answers
    finally:
        served.runner.close()
    profile = ledger.state(task).profiles.get(site or "", {}).get(digest)
    found = find(taken, answers, served.contract, None, profile)
    return {"task": task, "version": number, "package": digest, "engine": served.engine, **found.show(),
            "notice": NOTICE}  # fmt: skip


def replay(places: Places, number: str, path: Path) -> dict[str, Any]:
    """Answer a past prediction again: the recorded package and engine, the same place in a batch as large.

    Args:
        places: where journal, ledger and packages lie.
        number: id of the prediction.
        path: the image that was sent.

    Returns:
        What the journal says, what was answered now, and `equal`: whether they are the same, bit for bit.

    Raises:
        Unreadable: no such prediction, or another image than was sent.
        DataError: the row is older than replays, or the ledger lacks the site's profile that it followed.
        TrustError: the package does not hold any more.
    """
    row = open_journal(places.var).find(number)
    if row is None:
        raise Unreadable(f"The journal has no prediction {number[:60]!r}.", "Copy the answer's id.")
    if not row["batch"]:
        raise DataError("This prediction was journalled before replays were.", "Choose a newer one.")
    body, content_type = _read_file(path)
    if hashlib.sha256(body).hexdigest() != row["image"]:
        raise Unreadable(f"{path.name} is not the file that was sent.", "Its sha256 is in the journal.")
    folder = shelf(places.var, row["package"])
    ledger, seen = open_ledger(places.var), json.loads(row["columns"])
    verify_package(folder, ledger)
    profile = None
    if "profile" in seen:
        profile = find_numbered(ledger.signed(), row["task"], row["site"], int(seen["profile"]))
    contract, (place, size) = read_contract(folder), map(int, row["batch"].split(":"))
    taken = take(body, content_type, contract)
    answers = open_package(folder, row["package"], row["engine"]).run(np.stack([taken.prepared] * size))
    part = slice(place, place + 1)  # what stands beside an image does not change its bits, the size may
    found = find(taken, Answers(answers.logits[part], answers.heat[part], answers.embedding[part]), contract,
                 read_projection(folder), profile)  # fmt: skip
    told = {name: row[name] for name in ("id", "at", "task", "site", "version", "package", "engine", "batch")}
    return {**told, "answer": found.answer, "recorded": row["answer"], "replayed": found.digest(),
            "equal": found.digest() == row["answer"]}  # fmt: skip


def _read_file(path: Path) -> tuple[bytes, str]:
    """The bytes and the content type, by its suffix."""
    content_type = SUFFIXES.get(path.suffix.lower())
    if content_type is None:
        raise WrongType(f"{path.name} has no suffix that is known.", f"Use {', '.join(SUFFIXES)}.")
    try:
        return path.read_bytes(), content_type
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror}).", "Name a file.") from error


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
