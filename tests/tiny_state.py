"""What the monitor leaves behind, written as rows, so that a scrape has something to tell."""

from datetime import UTC, datetime, timedelta

import orjson
from sqlalchemy import text

from monitoring.journal import VerdictRow
from monitoring.records import EstimateRow, Records
from registry.database import writing

ESTIMATE = {
    "verdict": "not verified", "told": "Nobody has told the truth of any case yet.",
    "estimated": {"accuracy": {"estimate": 0.9, "low": 0.85, "high": 0.94},
                  "sensitivity": {"estimate": 0.8, "low": 0.7, "high": 0.9},
                  "specificity": {"estimate": 0.95, "low": 0.9, "high": 1.0},
                  "prevalence": 0.2, "subjects": 120},
    "realised": {"sensitivity": {"estimate": 0.75, "low": 0.5, "high": 0.9}},
}  # fmt: skip
STREAM = (
    "INSERT OR REPLACE INTO streams (task, site, version, rows, last_seq, state, history) "
    "VALUES (:task, :site, :version, :last, :last, :state, :history)"
)


def ago(seconds):
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def write_state(journal, places, body=ESTIMATE, last=0, history=b""):
    """A verdict, an estimate and a stream of each place, and the cursors of a pass that is just over."""
    for task, site in places:
        journal.write_verdict(VerdictRow(ago(0), task, site, 1, last, 200, "drift", "", 0.1, {}, ""))
    records = Records(journal.engine)
    records.append([EstimateRow(task=task, site=site, version=1, last_seq=last, body=body)
                    for task, site in places])  # fmt: skip
    state = orjson.dumps({"combined": {"score": 1.5, "parts": {}, "enough": True}, "recent": []}).decode()
    with writing(journal.engine).begin() as connection:
        for task, site in places:
            row = {"task": task, "site": site, "version": 1, "last": last, "state": state, "history": history}
            connection.execute(text(STREAM), row)
        for name, seq in (("watching", last), ("looked", int(datetime.now(UTC).timestamp()))):
            move = text("INSERT OR REPLACE INTO cursors VALUES (:name, :seq)")
            connection.execute(move, {"name": name, "seq": seq})
