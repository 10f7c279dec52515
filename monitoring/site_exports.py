"""Which cases a site's statistics are made of, and what may follow an earlier file of the same site."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import combinations, product
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
from monitoring.sums import LEAST, MEANS, SHARES, Statistics, read_statistics, sum_up, write_statistics
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
    threshold, columns = (_read_locked(evidence.body(Statement.EVALUATION), contract, site) if locked
                          else _read_live(places.var, asked, contract))  # fmt: skip
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
    """The operating point, None where it changed, and columns of the labelled answers.

    Probabilities are those that were answered, on the scale of the threshold: after a site's recalibration.
    """
    task, version, site = asked
    rows = [row for row in read_labels(open_records(var), task, site, version) if not row.get("abstained")]
    own = {row.get("threshold", contract.threshold) for row in rows}
    told = make_labelled(rows, contract.threshold)
    answered = np.array([row["probability"] for row in rows], dtype=float)
    columns = answered, told.positive, told.truth, told.people
    return float(own.pop()) if len(own) == 1 else None, columns


def _read_locked(body: dict[str, Any], contract: Contract, site: str) -> tuple[float, Columns]:
    rows = [row for row in body.get("predictions") or [] if row["site"] == site]
    if not all({"probability", "truth"} <= set(row) for row in rows):
        raise WrongLabel(f"{contract.task} answers masks: it has no sensitivity.", "Ask for another task.")
    scores = np.array([row["probability"] for row in rows], dtype=float)
    truth, people = (np.array([row[name] for row in rows]) for name in ("truth", "subject"))
    return contract.threshold, (scores, scores >= contract.threshold, truth, people)


def hold_to(before: Statistics, told: Statistics, kept: Path) -> None:
    """Refuse a file that differs from the last one by under ten cases, or that has as many and others."""
    if before.package != told.package:
        return
    old, new = _count(before), _count(told)
    near = [name for name in old if name in new and 0 < abs(new[name] - old[name]) < LEAST]
    nested = ((part, span) for part, span in product(_span(before), _span(told))
              if span[0] <= part[0] and part[1] <= span[1])  # fmt: skip
    if any(0 < abs(more - few) < LEAST for pair in nested for few, more in list(zip(*pair, strict=True))[2:]):
        near.append("bins")
    if not near and old == new and told != before.model_copy(update={"at": told.at}):
        near.append("sums of as many cases")
    if near:
        raise DataError(
            f"Beside the last file this one would tell of fewer than ten cases: {', '.join(near)} changed.",
            f"Wait for more labels, or send {kept} again.",
        )


def _count(told: Statistics) -> dict[str, float]:
    """Every count that a file gives away, bins aside."""
    counts: dict[str, float] = {}
    for name in (*SHARES, *MEANS):
        if one := getattr(told, name):
            counts |= {f"cases of {name}": one.cases, f"subjects of {name}": one.subjects}
            if name in SHARES:
                counts |= {f"hits of {name}": one.hits, f"misses of {name}": one.cases - one.hits}
            if told.brier:
                counts[f"cases beside {name}"] = told.brier.cases - one.cases
    return counts


def _span(told: Statistics) -> list[tuple[float, ...]]:
    """Of any neighbouring bins both ends, images, positives and negatives: edges move between files."""
    bins = told.bins or ()
    parts = (bins[low:high] for low, high in combinations(range(len(bins) + 1), 2))
    return [(part[0].low, part[-1].high, sum(one.count for one in part), sum(one.positives for one in part),
             sum(one.count - one.positives for one in part)) for part in parts]  # fmt: skip
