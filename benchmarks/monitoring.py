"""How long one pass of the monitor takes over a day's new rows, where the journal holds a million.

Writes a simulated journal in a folder that is thrown away: 100 sites and 10 models (2 tasks, 5 versions of
each), 10 subjects a day of each, days that do not differ. All but the last day are passed over first, a tenth
of them at a time; then the last day is timed: streams, charts, windows, estimates of accuracy. JSON: rows,
new_rows, places, pass_s, first_pass_s (of all the rows before), rss_mb (largest of the process), limits.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy import text

from imaging.config import Places
from imaging.vocabulary import Kind
from monitoring.records import Records, Refusal, open_records
from monitoring.watching import Watch
from registry.database import writing
from registry.package import Contract

ROOT = Path(__file__).parents[1]
SITES, VERSIONS, PER_DAY = 100, 5, 10
TASKS = ("lung-nodule", "retinopathy")
START = date(2026, 1, 1)
NAMES = ("background", "median", "bright", "contrast", "noise", "sharpness", "uncertainty",
         *(f"e{axis}" for axis in range(8)))  # fmt: skip
INSERT = text(
    "INSERT INTO predictions (id, at, request_id, task, site, version, package, engine, subject, image, "
    "columns, stages_ms, answer, batch, acquisition) VALUES (:id, :at, 'r', :task, :site, :version, "
    ":package, 'openvino/f32', :id, :id, :columns, :stages, '', '', :acquisition)"
)
STAGES, MADE = '{"engine": 4.0, "journal": 2.0}', '{"make": "Maker", "model": "One"}'
Place = tuple[str, str, int, str]  # task, site, version, digest of its package
PLACES: list[Place] = [(task, f"site-{site:02d}", version, f"sha256:{version}")
                       for site in range(SITES)
                       for task in TASKS for version in range(1, VERSIONS + 1)]  # fmt: skip


def write_day(
    records: Records,
    day: int,
    rng: np.random.Generator,
    places: list[Place] = PLACES,
    noisy: Place | None = None,
) -> int:
    """A day of every place, at one of them with more noise, in one transaction; how many rows."""
    rows = list(_draw(day, rng, places, noisy))
    with writing(records.engine).begin() as connection:
        connection.execute(INSERT, rows)
    sites = {place[:2]: rows[0]["at"] for place in places}
    records.append([Refusal(task=task, site=site, reason="unreadable", count=1, at=at)
                    for (task, site), at in sites.items()])  # fmt: skip
    return len(rows)


def _draw(
    day: int, rng: np.random.Generator, places: list[Place], noisy: Place | None
) -> Iterator[dict[str, Any]]:
    at = f"{(START + timedelta(days=day)).isoformat()}T12:00:00.000+00:00"
    for _ in range(PER_DAY):
        for place in places:
            task, site, version, package = place
            values = dict(zip(NAMES, rng.normal(size=len(NAMES)).round(4).tolist(), strict=True))
            values["probability"] = round(float(rng.beta(0.5, 0.5)), 4)
            values["noise"] += 2 * (place == noisy)
            key = rng.bytes(32).hex()
            yield {"id": key, "at": at, "task": task, "site": site, "version": version, "package": package,
                   "columns": json.dumps(values), "stages": STAGES, "acquisition": MADE}  # fmt: skip


def give_evaluation(watch: Watch, rng: np.random.Generator) -> None:
    """Simulated statements of evaluation, so that accuracy is estimated; serving would have signed ones."""
    scores = rng.beta(0.5, 0.5, 400)
    truth = rng.random(400) < scores
    rows = [
        {"sha256": str(n), "subject": str(n), "site": "site-00", "split": "test", "truth": int(true),
         "probability": float(score)} for n, (score, true) in enumerate(zip(scores, truth, strict=True))
    ]  # fmt: skip
    contract = Contract.model_construct(kind=Kind.CLASSIFICATION, threshold=0.5)
    for version in range(1, VERSIONS + 1):
        watch._estimator._packages[f"sha256:{version}"] = contract, {"predictions": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute: 100,000 rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    asked = parser.parse_args()
    days, rng = 10 if asked.quick else 100, np.random.default_rng(7)
    with tempfile.TemporaryDirectory() as folder:
        var = Path(folder)
        for name in ("params.yaml", "sites.yaml", "registry/policies"):
            target = var / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
        records = open_records(var)
        watch, first_s, rows, new = Watch(Places(var, var / "build", var), records.engine), 0.0, 0, 0
        give_evaluation(watch, rng)
        for day in range(days):
            new = write_day(records, day, rng)
            rows += new
            if day == days - 1 or (day + 2) % max(1, days // 10) == 0 or day == days - 2:
                start = time.perf_counter()
                done = watch.look(START + timedelta(days=day + 1))
                spent = time.perf_counter() - start
                first_s += spent if day < days - 1 else 0.0
    told = {
        "rows": rows, "new_rows": new, "places": done.places, "pass_s": round(spent, 2),
        "first_pass_s": round(first_s, 1), "estimates": len(done.estimates), "alarms": len(done.alarms),
        "rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "limits": {"pass_s": 10, "rss_mb": 1024},
    }  # fmt: skip
    print(json.dumps(told))
    if asked.json:
        asked.json.write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
