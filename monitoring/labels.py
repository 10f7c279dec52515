"""Truths that come late: from CSV, over HTTP and from readers, all through one door."""

from __future__ import annotations

import base64
import json
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from imaging.config import Places
from imaging.errors import UnknownPrediction, WrongLabel
from imaging.vocabulary import Judged, Kind, Statement
from monitoring.journal import Journal, pseudonym
from monitoring.records import Assessment, Records, make
from registry.evidence import find_cited, find_statement
from registry.ledger import open_ledger
from registry.package import Contract, read_contract, shelf
from registry.trials.rows import TrialRows, open_rows

REASON, READER = 500, 256  # characters
MOST, SHOWN = 100, 50  # assessments of an answer that are kept, and told
SCORES = ("probability", "raw_probability", "threshold", "abstained")
NEWEST = (  # truths alone, and labels before what readers say: a click takes no label away
    "SELECT a.prediction, a.truth, a.verdict, a.reader, a.source, p.subject, p.at, p.columns FROM "
    "assessments a JOIN predictions p ON p.id = a.prediction WHERE a.seq IN (SELECT COALESCE(MAX(CASE "
    "verdict WHEN 'labelled' THEN seq END), MAX(seq)) FROM assessments WHERE task = :task AND site = :site "
    "AND version = :version AND truth IS NOT NULL GROUP BY prediction) ORDER BY p.seq"
)
SAID = text(  # the newest that each reader said of an answer, his labels apart, and how often he spoke
    "SELECT a.*, MAX(a.seq), COUNT(*) AS count FROM json_each(:ids) AS asked JOIN assessments a "
    "ON a.prediction = asked.value GROUP BY a.prediction, a.reader, a.verdict = 'labelled'"
)
COLUMNS = [one.name for one in fields(Assessment) if one.name != "seq"]
NAMES, SAME = ", ".join(COLUMNS), attrgetter(*(one for one in COLUMNS if one not in ("at", "source")))
STAGE = (
    "DROP TABLE IF EXISTS temp.staged", "CREATE TEMP TABLE staged AS SELECT * FROM assessments WHERE 0",
    f"INSERT INTO temp.staged ({NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})",
)  # fmt: skip
INSERT = f"INSERT INTO assessments ({NAMES}) SELECT {NAMES} FROM temp.staged ORDER BY rowid"
SINCE = text("SELECT prediction FROM assessments WHERE seq > :seen")


@dataclass(frozen=True)
class Judgement:
    """What somebody says of an answer.

    Attributes:
        prediction: id of the answer.
        verdict: of `imaging.vocabulary.Judged`.
        truth: 1 positive, 0 negative; None where it follows from the verdict, or nobody says.
        reason: in a sentence, without anything of the patient.
        reader: who says so, in the clear; only a pseudonym is kept.
        source: csv, http or console.
    """

    prediction: str
    verdict: Judged
    truth: int | None = None
    reason: str = ""
    reader: str = ""
    source: str = "http"


def read_labels(records: Records, task: str, site: str, version: int) -> list[dict[str, Any]]:
    """The answers of a version at a site whose truth is known, in the order of the answers.

    Returns:
        Of each its newest label, else the newest judgement that has a truth: prediction, subject, at (of the
        answer), truth, verdict, reader, source; probability, and where the site has a profile
        raw_probability, threshold and abstained. An answer without a single probability is left out.
    """
    with records.engine.connect() as connection:
        found = connection.execute(text(NEWEST), {"task": task, "site": site, "version": version})
        rows = [dict(row) for row in found.mappings()]
    columns = [json.loads(row.pop("columns")) for row in rows]
    return [{**row, **{name: told[name] for name in SCORES if name in told}}
            for row, told in zip(rows, columns, strict=True) if "probability" in told]  # fmt: skip


class Door:
    """Takes judgements of a site's answers.

    Args:
        places: where packages, keys and the ledger lie.
        journal: of the answers.
        records: where judgements are kept.
    """

    def __init__(self, places: Places, journal: Journal, records: Records) -> None:
        self._var, self._journal, self._records = places.var, journal, records
        self._ledger = open_ledger(places.var)
        self._trials: TrialRows | None = None
        self._locked: tuple[Any, dict[tuple[str, str], set[str]]] | None = None

    def keep(self, site: str, told: list[Judgement], dry_run: bool = False) -> tuple[list[Assessment], int]:
        """Keep judgements in one transaction, and tell the truths among them to silent trials.

        What the same reader said last of the same answer, word for word, is not kept again.

        Args:
            site: whose answers they are of.
            told: the judgements.
            dry_run: look, and keep nothing.

        Returns:
            The assessments, and how many of them are new.

        Raises:
            UnknownPrediction: the site has no such answer.
            WrongLabel: the truth contradicts the verdict, lacks or cannot be known, the answer's image or
                subject stands in a locked test set, the reason is too long, or the answer has 100
                assessments.
        """
        return self.write([self.examine(site, one) for one in told], dry_run)

    def write(self, rows: list[Assessment], dry_run: bool = False) -> tuple[list[Assessment], int]:
        """As `keep`, of rows that `examine` made."""
        last: int | None = None
        while last is None:
            with self._records.engine.connect() as connection:
                told, seen = _sort_out(connection, rows)
            new = sorted((row.prediction, place) for place, row in enumerate(told) if not row.seq)
            last = 0 if dry_run or not new else self._insert([told[place] for _, place in new], seen)
        if not dry_run:
            for seq, (_, place) in enumerate(new, last - len(new) + 1):
                told[place] = replace(told[place], seq=seq)
            self._tell_trials({row.prediction: bool(row.truth) for row in rows if row.truth is not None})
        return told, len(new)

    def _insert(self, rows: list[Assessment], seen: int) -> int | None:
        """The last row's number; None, and nothing is written, where somebody judged such an answer since.

        Answers wait for the lock: rows are made ready before it, in the order of the index, which is faster.
        """
        values, asked = list(map(attrgetter(*COLUMNS), rows)), {row.prediction for row in rows}
        with self._records.engine.connect() as connection:
            for statement, told in zip(STAGE, (None, None, values), strict=True):
                connection.exec_driver_sql(statement, told)
            connection.commit()
            with connection.execution_options(writing=True).begin():
                if not asked.isdisjoint(connection.execute(SINCE, {"seen": seen}).scalars()):
                    return None
                connection.exec_driver_sql(INSERT)
                return int(connection.exec_driver_sql("SELECT last_insert_rowid()").scalar_one())

    def examine(self, site: str, told: Judgement) -> Assessment:
        """The row that a judgement would become; as `keep`, without keeping it."""
        answer = self._find(site, told.prediction)
        contract = read_promise(self._var, answer["package"])
        columns = json.loads(answer["columns"])
        self._hold_apart(answer)
        reason = " ".join(told.reason.split())
        if len(reason) > REASON:
            raise WrongLabel(f"The reason has {len(reason)} characters.", f"Say it in at most {REASON}.")
        reader = pseudonym(self._var, site, f"reader {told.reader}"[:READER]) if told.reader else ""
        return Assessment(
            task=answer["task"], site=site, version=answer["version"], prediction=told.prediction,
            source=told.source, verdict=told.verdict, truth=_find_truth(told, columns, contract),
            reason=reason, reader=reader,
        )  # fmt: skip

    def list_judgements(self, site: str, prediction: str) -> list[Assessment]:
        """What was said of an answer, the newest 50, oldest first.

        Raises:
            UnknownPrediction: the site has no such answer.
        """
        self._find(site, prediction)
        query = text("SELECT * FROM assessments WHERE prediction = :id ORDER BY seq DESC LIMIT :most")
        with self._records.engine.connect() as connection:
            found = connection.execute(query, {"id": prediction, "most": SHOWN}).mappings()
            return [make(Assessment, dict(row)) for row in found][::-1]

    def _find(self, site: str, prediction: str) -> dict[str, Any]:
        answer = self._journal.find(prediction)
        if answer is None or answer["site"] != site:  # that another site has it is nobody's business
            raise UnknownPrediction(f"{site} has no prediction {prediction[:64]!r}.", "See the answer's id.")
        return answer

    def _hold_apart(self, answer: dict[str, Any]) -> None:
        """Refuse an answer of a locked test set, of any version of its task, by image and by subject.

        The journal has the digest of the file that was sent, a locked set that of the pixels: a locked image
        in another file is known by its subject alone, if that was named.
        """
        if not self._locked or self._locked[0] != self._ledger.head():
            self._locked = self._ledger.head(), {}
        task, site, known = answer["task"], answer["site"], self._locked[1]
        if (task, site) not in known:
            known[(task, site)] = self._gather_locked(task, site)
        if {answer["image"], answer["subject"]} & known[(task, site)]:
            raise WrongLabel(
                f"Prediction {answer['id']} is of a locked test set of {task}.",
                "Such a set takes no labels from outside.",
            )

    def _gather_locked(self, task: str, site: str) -> set[str]:
        events = self._ledger.signed()
        cited = {digest: find_cited(events, digest) for _, _, digest, _ in self._ledger.versions(task)}
        told = {
            digest: event.body["evidence"].get(Statement.EVALUATION)
            for digest, event in cited.items()
            if event
        }
        return set().union(*(read_locked(self._var, digest, statement, site)
                             for digest, statement in told.items() if statement))  # fmt: skip

    def _tell_trials(self, truths: dict[str, bool]) -> None:
        if self._trials is None and (self._var / "trials.db").exists():
            self._trials = open_rows(self._var)
        if truths and self._trials:
            self._trials.tell_truth(truths)


@lru_cache(256)
def read_promise(var: Path, digest: str) -> Contract:
    """The contract of a package on the shelf."""
    return read_contract(shelf(var, digest))


@lru_cache(256)
def read_locked(var: Path, digest: str, cited: str, site: str) -> frozenset[str]:
    """Digests of the images of a package's locked sets, and pseudonyms of the subjects of a site in them.

    Args:
        var: holds packages and keys.
        digest: of the package.
        cited: sha256:... of the evaluation statement, as the signed ledger has it.
        site: the site.
    """
    path = find_statement(shelf(var, digest), Statement.EVALUATION, cited)
    body = json.loads(base64.b64decode(json.loads(path.read_bytes())["payload"]))["predicate"]
    rows = body.get("predictions") or []
    people = {row["subject"] for row in rows if row["site"] == site}
    return frozenset([*(row["sha256"] for row in rows), *(pseudonym(var, site, one) for one in people)])


def _find_truth(told: Judgement, columns: dict[str, Any], contract: Contract) -> int | None:
    """The truth that a judgement tells; of a mask, which is neither positive nor negative, none.

    Raises:
        WrongLabel: it contradicts the verdict, is needed and lacks, or a mask has none.
    """
    if contract.kind is Kind.SEGMENTATION or "probability" not in columns:
        if told.truth is not None:
            raise WrongLabel(f"{contract.task} answers masks: no truth is 0 or 1.", "Leave the truth out.")
        return None
    if told.truth not in (0, 1, None):
        raise WrongLabel("The truth is neither 0 nor 1.", "1 is positive.")
    if told.verdict in (Judged.LABELLED, Judged.CORRECTED) and told.truth is None:
        raise WrongLabel(f"It was {told.verdict} without a truth.", "Say truth 1, positive, or 0, negative.")
    own = int(columns["probability"] >= columns.get("threshold", contract.threshold))
    found = {} if columns.get("abstained") else {Judged.ACCEPTED: own, Judged.REJECTED: 1 - own}
    implied = found.get(told.verdict)
    if implied is not None and told.truth not in (None, implied):
        raise WrongLabel(
            f"The answer was {'positive' if own else 'negative'}; {told.verdict} with truth {told.truth} "
            "contradicts it.", "Leave the truth out, or say corrected.",
        )  # fmt: skip
    return told.truth if implied is None else implied


def _sort_out(connection: Connection, rows: list[Assessment]) -> tuple[list[Assessment], int]:
    """What was said before instead of each row that says the same, and the newest row of all.

    Raises:
        WrongLabel: an answer that something new is said of has as many assessments as are kept.
    """
    seen = connection.execute(text("SELECT COALESCE(MAX(seq), 0) FROM assessments")).scalar_one()
    ids = json.dumps([*{row.prediction for row in rows}])
    said, count = dict[Any, Assessment](), Counter[str]()
    for one in connection.execute(SAID, {"ids": ids}).mappings():
        last = make(Assessment, dict(one))
        said[SAME(last)] = last
        count[last.prediction] += one["count"]
    told = [said.get(SAME(row), row) for row in rows]
    full = next((row.prediction for row in told if not row.seq and count[row.prediction] >= MOST), None)
    if full:
        raise WrongLabel(f"Prediction {full} has {MOST} assessments.", "It takes no more.")
    return told, seen
