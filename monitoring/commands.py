"""`formulary monitoring ...`: read the configuration, call one function, print."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

import click

from imaging.config import read_params, read_places
from imaging.terminal import print_table
from monitoring.journal import VerdictRow, open_journal

TASK = click.option("--task", default=None, help="Only this task of params.yaml.")
SITE = click.option("--site", default=None, help="Only this site of sites.yaml.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@click.group()
def monitoring() -> None:
    """What is recorded of each prediction, and what it is compared with."""


@monitoring.command()
@click.option("--task", required=True, help="The task whose drift test is calibrated.")
def reference(task: str) -> None:
    """Pipeline stage: measure how often the drift test alarms on null windows, and what it sees."""
    from monitoring.alarms import calibrate_alarms, write_alarms

    places = read_places()
    body = calibrate_alarms(read_params(places).task(task).reference, places.stage(task, "package"))
    write_alarms(body, places.stage(task, "reference"))
    rows = [[site, str(told["subjects"]), f"{told['null_alarm_share'][0]:.3f}", f"{told['shift_seen_sd']} sd"]
            for site, told in body["sites"].items() if told["judged"]]  # fmt: skip
    print_table(f"{task}: drift test at alpha {body['alpha']}, window {body['window']}",
                ["site", "reference subjects", "null alarms", "shift seen"], rows)  # fmt: skip


@monitoring.command()
@TASK
@SITE
@AS_JSON
def check(task: str | None, site: str | None, as_json: bool) -> None:
    """Compare every site that has new answers with its reference, once, now."""
    from monitoring.drift import Monitor

    places = read_places()
    params = read_params(places)
    if task:
        params.task(task)
    _print(Monitor(places, params).look((task,) if task else (), (site,) if site else ()), as_json)


@monitoring.command()
def watch() -> None:
    """Go on comparing until stopped."""
    from monitoring.drift import Monitor

    places = read_places()
    Monitor(places, read_params(places)).watch()


@monitoring.command()
@AS_JSON
def verdicts(as_json: bool) -> None:
    """The newest verdict of every task and site."""
    _print(open_journal(read_places().var).newest_verdicts(), as_json)


@monitoring.command()
@TASK
@SITE
@click.option("--limit", default=20, show_default=True, help="At most this many rows, the newest.")
@AS_JSON
def journal(task: str | None, site: str | None, limit: int, as_json: bool) -> None:
    """The newest predictions."""
    rows = open_journal(read_places().var).newest(task, site, limit)
    if as_json:
        click.echo(json.dumps(rows))
        return
    print_table("Journal", ["#", "when (UTC)", "task", "site", "version", "engine", "prediction"],
                [[str(row["seq"]), row["at"][:19], row["task"], row["site"], f"v{row['version']}",
                  row["engine"], row["id"]] for row in rows])  # fmt: skip


@monitoring.command()
@click.option("--port", default=8000, show_default=True, help="On 127.0.0.1.")
def ui(port: int) -> None:
    """Run Evidently's own pages on loopback, over var/evidently."""
    folder = read_places().var / "evidently"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "evidently.cli", "ui", "--workspace", str(folder), "--host", "127.0.0.1"]
    os.execv(sys.executable, [*command, "--port", str(port)])


def _print(rows: list[VerdictRow], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    print_table("Drift verdicts", ["task", "site", "version", "subjects", "verdict", "detail"],
                [[row.task, row.site, f"v{row.version}", str(row.subjects), row.verdict, row.detail]
                 for row in rows])  # fmt: skip
