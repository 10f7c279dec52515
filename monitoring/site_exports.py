"""Which cases a site's statistics are made of, and what may follow an earlier file of the same site."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places, read_sites
from imaging.errors import DataError, WrongLabel
from imaging.vocabulary import Statement
from monitoring.labels import read_labels
from monitoring.realised import make_labelled
from monitoring.records import open_records
from monitoring.sums import LEAST, Statistics, read_statistics, sum_up, write_statistics
from registry.evidence import verify_package
from registry.ledger import Ledger
from registry.package import Contract, read_contract, shelf

Columns = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]  # scores, positive, truth, people


def export_statistics(
    places: Places, ledger: Ledger, asked: tuple[str, int, str], path: Path, locked: bool = False
) -> Statistics:
    """Write a site's statistics of a version.

    Args:
        places: where packages, journal and earlier files lie.
        ledger: which package is that version.
        asked: task, version and site.
        path: the file to write.
        locked: the site's images of the locked sets, instead of its labelled answers.

    Raises:
        UnknownVersion: there is none.
        UnknownSite: sites.yaml does not list it.
        TrustError: the package's evidence does not hold.
        DataError: it has no such cases; or the file differs by under ten cases from the last one, so that
            whoever has both would know of them.
    """
    task, version, site = asked
    read_sites(places).site(site)
    digest, _ = ledger.version(task, version)
    evidence = verify_package(shelf(places.var, digest), ledger)
    contract = read_contract(shelf(places.var, digest))
    threshold, columns = (
        _read_locked(evidence.body(Statement.EVALUATION), contract, site)
        if locked
        else _read_live(places.var, asked, contract)
    )
    if not len(columns[0]):
        raise DataError(f"{site} has no labelled case of {task} v{version}.", "Send labels first.")
    told = Statistics(
        task=task, version=version, package=digest, threshold=threshold, site=site,
        source="locked" if locked else "live", simulated=contract.simulated,
        at=datetime.now(UTC).isoformat(timespec="seconds"), **sum_up(*columns, threshold),
    )  # fmt: skip
    kept = places.var / "statistics" / f"{task}-v{version}-{site}-{told.source}.json"
    if kept.exists():
        hold_to(read_statistics(kept), told, kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    for one in (kept, path):
        write_statistics(told, one)
    return told


def _read_live(var: Path, asked: tuple[str, int, str], contract: Contract) -> tuple[float | None, Columns]:
    """The operating point, None where it changed, and columns of the labelled answers."""
    task, version, site = asked
    rows = read_labels(open_records(var), task, site, version)
    own = {row.get("threshold", contract.threshold) for row in rows if not row.get("abstained")}
    told = make_labelled(rows, contract.threshold)
    columns = told.scores, told.positive, told.truth, told.people
    return float(own.pop()) if len(own) == 1 else None, columns


def _read_locked(body: dict[str, Any], contract: Contract, site: str) -> tuple[float, Columns]:
    rows = [row for row in body.get("predictions") or [] if row["site"] == site]
    if not all({"probability", "truth"} <= set(row) for row in rows):
        raise WrongLabel(f"{contract.task} answers masks: it has no sensitivity.", "Ask for another task.")
    scores = np.array([row["probability"] for row in rows], dtype=float)
    truth, people = (np.array([row[name] for row in rows]) for name in ("truth", "subject"))
    return contract.threshold, (scores, scores >= contract.threshold, truth, people)


def hold_to(before: Statistics, told: Statistics, kept: Path) -> None:
    """Refuse a file whose counts differ from the last one's by under ten."""
    if before.package != told.package:
        return
    near = [name for name, old, new in _pair_counts(before, told) if 0 < abs(new - old) < LEAST]
    if near:
        raise DataError(
            f"Beside the last file this one would tell of fewer than ten cases: {', '.join(near)} changed.",
            f"Wait for more labels, or send {kept} again.",
        )


def _pair_counts(before: Statistics, told: Statistics) -> Iterator[tuple[str, float, float]]:
    for name in ("accuracy", "sensitivity", "specificity"):
        old, new = getattr(before, name), getattr(told, name)
        if old and new:
            yield f"cases of {name}", old.cases, new.cases
            yield f"hits of {name}", old.hits, new.hits
            yield f"misses of {name}", old.cases - old.hits, new.cases - new.hits
    if before.bins and told.bins and [one.high for one in before.bins] == [one.high for one in told.bins]:
        for old, new in zip(before.bins, told.bins, strict=True):
            yield f"images up to {old.high:g}", old.count, new.count
            yield f"positives up to {old.high:g}", old.positives, new.positives
