"""When accuracy is estimated anew, and from what: subjects, labels and the version's evaluation statement."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from sqlalchemy import Engine

from imaging.config import Places
from imaging.errors import FormularyError
from imaging.vocabulary import Statement
from monitoring.estimation import estimate_place
from monitoring.labels import read_labels
from monitoring.records import EstimateRow, Records
from monitoring.streams import BOUND, KEPT, SHOWN, Streams
from registry.evidence import verify_package
from registry.ledger import open_ledger
from registry.package import Contract, read_contract, shelf

MORE = 20  # subjects since the last estimate
AGAIN_S = 60  # between two estimates of a place whose labels come one by one
NEWEST = 500  # subjects that an estimate rests on
SCORES = ("probability", *KEPT)  # as streams have them


class Estimator:
    """Estimates accuracy of places where enough is new.

    Args:
        places: where packages and their evidence lie.
        engine: of the journal's database.
    """

    def __init__(self, places: Places, engine: Engine) -> None:
        self._places, self._records = places, Records(engine)
        self._ledger = open_ledger(places.var)
        self._packages: dict[str, tuple[Contract, dict[str, Any]] | None] = {}

    def estimate(self, streams: Streams, labels: int) -> list[EstimateRow]:
        """An estimate where twenty more subjects, or more labels, came since the last one; else none.

        Args:
            streams: of the place.
            labels: how many assessments it has.

        Returns:
            At most one row.
        """
        more = streams.subjects >= streams.estimated[0] + MORE or self.owes(streams, labels)
        package = self._open(streams.package) if more and streams.package else None
        if package is None:
            return []
        streams.estimated = [streams.subjects, labels, int(time.time())]
        told = read_labels(self._records, streams.task, streams.site, streams.version)
        body = estimate_place(_list_cases(streams), told, package[1], package[0], streams.site)
        return [EstimateRow(task=streams.task, site=streams.site, version=streams.version,
                            last_seq=streams.last_seq, body=body)]  # fmt: skip

    def owes(self, streams: Streams, labels: int, soon: bool = False) -> bool:
        """Whether labels came that no estimate knows; `soon` asks no matter when the last one was made."""
        return labels != streams.estimated[1] and (soon or time.time() - streams.estimated[2] >= AGAIN_S)

    def _open(self, digest: str) -> tuple[Contract, dict[str, Any]] | None:
        """Contract and evaluation of a package; None where its evidence does not hold."""
        if digest not in self._packages:
            folder = shelf(self._places.var, digest)
            try:
                evaluation = verify_package(folder, self._ledger).body(Statement.EVALUATION)
                self._packages[digest] = read_contract(folder), evaluation
            except FormularyError:
                return None  # serving says so; it may hold again later
        return self._packages[digest]


def _list_cases(streams: Streams) -> list[dict[str, Any]]:
    """What `estimate_place` reads of the newest subjects that have a probability."""
    cases = streams.cases
    if "probability" not in cases.names:
        return []
    names = [name for name in SCORES if name in cases.names]
    rows = cases.select(names).astype(float)
    told = [{name: value for name, value in zip(names, row, strict=True) if value == value}
            for row in rows[np.isfinite(cases.column("probability"))][-NEWEST:].tolist()]  # fmt: skip
    for row in told:
        if SHOWN in row:  # a profile's probability stands in the answer, the network's own beside it
            row["raw_probability"], row["probability"] = row["probability"], row.pop(SHOWN)
        if BOUND in row:
            row["threshold"] = row.pop(BOUND)
    return told
