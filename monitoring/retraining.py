"""A request to train again because of a site: which rows speak for it, and the command, which nobody ran."""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text

from imaging.config import Params, Places, read_params, read_sites
from imaging.errors import DataError
from imaging.manifest import read_manifest
from imaging.vocabulary import SiteKind
from monitoring.containment import open_alarms
from monitoring.records import Records
from registry.ledger import Ledger

LAST_STAGE = "reference"
COLUMNS = ("prediction", "at", "subject", "image", "truth")
ROWS = (
    "SELECT p.id AS prediction, p.at, p.subject, p.image, (SELECT a.truth FROM assessments a WHERE "
    "a.prediction = p.id AND a.truth IS NOT NULL ORDER BY a.verdict = 'labelled' DESC, a.seq DESC LIMIT 1) "
    "AS truth FROM predictions p "
    "WHERE p.task = :task AND p.site = :site AND p.version = :version AND p.at >= :since ORDER BY p.seq"
)


def request_retraining(
    places: Places, records: Records, ledger: Ledger, place: tuple[str, str], told: dict[str, str]
) -> tuple[Path, dict[str, Any]]:
    """Write request.json, rows.csv and cohort.csv under var/retraining. Nothing is run, nothing decided.

    Args:
        places: of the checkout.
        records: beside the journal.
        ledger: which version serves the site, and its open alarms.
        place: task and site.
        told: `because`, why; and `since`, the first day (YYYY-MM-DD) whose answers count, or "".

    Returns:
        The folder, and what request.json holds.

    Raises:
        DataError: nothing serves the site, or it answered nothing since then.
    """
    (task, site), params = place, read_params(places)
    params.task(task)
    kind = read_sites(places).site(site).kind
    if not (trail := ledger.state(task).trail.get(site)):
        raise DataError(f"No version of {task} was ever approved for {site}.", "Approve one first.")
    rows = _read_rows(records, (task, site, trail[-1].version), told["since"])
    cohort, labelled = _read_cohort(places, place), sum(row["truth"] is not None for row in rows)
    folder = places.var / "retraining" / f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}-{task}-{site}"
    folder.mkdir(parents=True)
    body = {
        "task": task, "site": site, "version": trail[-1].version, "package": trail[-1].digest, **told,
        "alarms": [event.body["alarm"] for event in open_alarms(ledger, task).get(site, [])],
        "command": shlex.join(prepare_command(params, place, kind, cohort)),
        "rows": {"count": len(rows), "labelled": labelled,
                 "digest": _write(folder / "rows.csv", rows, COLUMNS)},
        "cohort": {"images": len(cohort), "subjects": len({row["subject"] for row in cohort}),
                   "digest": _write(folder / "cohort.csv", cohort, ("sha256", "subject", "split"))},
        "missing": _list_missing(len(rows), labelled, cohort),
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return folder, body


def prepare_command(
    params: Params, place: tuple[str, str], kind: SiteKind, cohort: list[dict[str, Any]]
) -> list[str]:
    """The experiment, to the last stage of the task: another seed; and of an external site half its subjects.

    A site that the split keeps external trains nothing; `split.local` lets some of its subjects do so.
    """
    (task, site), section = place, params.task(place[0])
    changes = [f"tasks.{task}.fit.seed={section.fit.seed + 1}"]
    half = len({row["subject"] for row in cohort}) // 2
    if kind is SiteKind.EXTERNAL and half and site not in section.split.local:
        changes.append(f"+tasks.{task}.split.local.{site}={half}")
    asked = [part for change in changes for part in ("--set-param", change)]
    return ["dvc", "exp", "run", "--name", f"retrain-{task}-{site}", *asked, f"{LAST_STAGE}@{task}"]


def _read_rows(records: Records, place: tuple[str, str, int], since: str) -> list[dict[str, Any]]:
    asked = dict(zip(("task", "site", "version", "since"), (*place, since), strict=True))
    with records.engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(text(ROWS), asked).mappings()]
    if not rows:
        raise DataError(f"{place[0]} v{place[2]} has answered nothing at {place[1]} since then.",
                        "Name an earlier day.")  # fmt: skip
    return rows


def _read_cohort(places: Places, place: tuple[str, str]) -> list[dict[str, Any]]:
    """The site's rows of the manifest; none where the pipeline has not run here."""
    path = places.stage(place[0], "split") / "manifest.parquet"
    if not path.exists():
        return []
    table = read_manifest(path)
    rows: list[dict[str, Any]] = table[table["site"] == place[1]].to_dict("records")
    return [{name: row[name] for name in ("sha256", "subject", "split")} for row in rows]


def _list_missing(rows: int, labelled: int, cohort: list[dict[str, Any]]) -> list[str]:
    missing = [f"the pixels of all {rows} answers: the journal keeps none; ask the site for the files whose "
               "sha256 stand in rows.csv, and import them: docs/importing.md"]  # fmt: skip
    if labelled < rows:
        missing.append(f"the truth of {rows - labelled} of {rows} answers")
    if not cohort:
        missing.append("rows of the site in the cohort's manifest")
    return missing


def _write(path: Path, rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
