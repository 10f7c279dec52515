"""How long the console's pages take, where the journal holds a million rows of 100 sites and 10 tasks.

Trains ten tiny networks, lets each serve at 100 simulated sites by records that two people sign, writes 100
days of 10 subjects a place (at one place the noise grows, so that there are alarms), looks at them with the
monitor, and asks a live gateway for pages as somebody who is logged in. JSON: rows, places, pages.<name>:
first_ms (in a gateway that has just started and drawn nothing), median_ms, most_ms (of ten), limit_ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.monitoring import START, Place, write_day
from imaging.config import Places
from imaging.vocabulary import Decision, Kind
from monitoring.containment import contain_new
from monitoring.records import Records, open_records
from monitoring.watching import Watch
from registry.access import admit
from registry.ledger import open_ledger
from tests.tiny import promote, train, write_root
from tests.tiny_gateway import Gateway

TASKS, SITES, REPEATS, LIMIT_MS = 10, 100, 10, 300


def approve_everywhere(places: Places, tasks: list[str]) -> list[Place]:
    """Serve version 1 of every task at a hundred sites."""
    names = ["north", "east", *(f"site-{number:02d}" for number in range(SITES - 2))]
    sites = {name: {"kind": "internal", "title": f"{name} (simulated)"} for name in names}
    (places.root / "sites.yaml").write_text(yaml.safe_dump({"sites": sites}, sort_keys=False))
    ledger, found = open_ledger(places.var), []
    author, approver = (admit(places.var, ledger, f"{who}@test") for who in ("author", "approver"))
    for task in tasks:
        digest = ledger.version(task, 1)[0]
        body = {"version": 1, "digest": digest, "sites": names[2:]}
        with ledger.writing() as writer:
            asked = writer.append(Decision.REQUESTED, task, body | {"verdict": {}, "approvers": []}, author)
            writer.append(
                Decision.APPROVED, task, body | {"asked": asked.seq, "because": "Simulated."}, approver
            )
        found += [(task, name, 1, digest) for name in names]
    return found


def fill(places: Places, records: Records, where: list[Place], days: int) -> int:
    """The journal, looked at ten times by the monitor; how many rows."""
    rng, watch, rows = np.random.default_rng(7), Watch(places, records.engine), 0
    for day in range(days):
        rows += write_day(records, day, rng, where, where[0] if day >= days // 2 else None)
        if (day + 1) % max(1, days // 10) == 0:
            watch.look(START + timedelta(days=day + 1))
    contain_new(places, records, open_ledger(places.var))
    return rows


def time_pages(places: Places, records: Records, noisy: Place) -> dict[str, Any]:
    """Milliseconds of every page, as a client on the same machine sees them."""
    with records.engine.connect() as connection:
        one = "SELECT id FROM predictions WHERE task = ? AND site = ? ORDER BY seq DESC LIMIT 1"
        case = connection.exec_driver_sql(one, noisy[:2]).scalar_one()
    site = "/console/tasks/{}/sites/{}".format(*noisy[:2])
    pages = {"site": site, "quiet site": "/console/tasks/task-3/sites/site-40", "matrix": "/console",
             "wrong alone": "/console?wrong=1", "version": "/console/tasks/task-0/versions/1",
             "case": f"/console/cases/{case}", "queue": "/console/queue"}  # fmt: skip
    with Gateway(places) as gateway:
        log_in(gateway)
        time.sleep(5)  # what a gateway loads when nobody asks
        return {name: time_page(gateway, path) for name, path in pages.items()}


def log_in(gateway: Gateway) -> None:
    """By a link, as a person does."""
    link = gateway.make_link("author@test")
    origin = str(gateway.client.base_url).rstrip("/")
    gateway.client.get(link)
    code = link.partition("code=")[2]
    told = gateway.client.post("/console/login", data={"code": code}, headers={"Origin": origin})
    assert told.status_code == 303, told.text


def time_page(gateway: Gateway, path: str) -> dict[str, float]:
    """The first time, and the median and the most of ten more."""
    spent = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        told = gateway.client.get(path)
        spent.append(round(1000 * (time.perf_counter() - start), 1))
        assert told.status_code == 200, told.text
    return {"first_ms": spent[0], "median_ms": statistics.median(spent[1:]), "most_ms": max(spent[1:]),
            "limit_ms": LIMIT_MS}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    asked, tasks = parser.parse_args(), [f"task-{number}" for number in range(TASKS)]
    with tempfile.TemporaryDirectory() as folder:
        places = write_root(Path(folder), **dict.fromkeys(tasks, Kind.CLASSIFICATION))
        for task in tasks:  # all are scored on the same simulated set
            path = places.policies / f"{task}.yaml"
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"test_set": {"uses": TASKS}}))
            promote(places, task, train(places, task))
        where, records = approve_everywhere(places, tasks), open_records(places.var)
        rows = fill(places, records, where, 10 if asked.quick else 100)
        told = {"rows": rows, "places": len(where), "pages": time_pages(places, records, where[0])}
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
