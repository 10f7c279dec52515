"""`formulary monitoring ...`: read the configuration, call one function, print."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from imaging.config import read_params, read_places
from imaging.terminal import print_table
from monitoring.accuracy_commands import COMMANDS as ACCURACY_COMMANDS
from monitoring.alert_commands import COMMANDS as ALERT_COMMANDS
from monitoring.journal import VerdictRow, open_journal
from monitoring.site_commands import COMMANDS as SITE_COMMANDS

TASK = click.option("--task", default=None, help="Only this task of params.yaml.")
SITE = click.option("--site", default=None, help="Only this site of sites.yaml.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@click.group()
def monitoring() -> None:
    """What is recorded of each prediction, and what it is compared with."""


for command in (*ACCURACY_COMMANDS, *ALERT_COMMANDS, *SITE_COMMANDS):
    monitoring.add_command(command)


@monitoring.command()
@click.option("--task", required=True, help="The task whose drift test is calibrated.")
def reference(task: str) -> None:
    """Pipeline stage: measure how often the drift test alarms on null windows, and what it sees."""
    from monitoring.alarms import calibrate_alarms, write_alarms
    from registry.policy import read_policy

    places = read_places()
    section, promise = read_params(places).task(task).reference, read_policy(task, places.policies)
    body = calibrate_alarms(section, places.stage(task, "package"), promise.surveillance)
    write_alarms(body, places.stage(task, "reference"))
    rows = [[site, str(told["subjects"]), f"{told['null_alarm_share'][0]:.3f}", f"{told['shift_seen_sd']} sd"]
            for site, told in body["sites"].items() if told["judged"]]  # fmt: skip
    print_table(f"{task}: drift test at alpha {body['alpha']}, window {body['window']}",
                ["site", "reference subjects", "null alarms", "shift seen"], rows)  # fmt: skip


@monitoring.command()
@TASK
@SITE
@click.option("--reports/--no-reports", default=True, help="Also Evidently's reports, which take longer.")
@AS_JSON
def check(task: str | None, site: str | None, reports: bool, as_json: bool) -> None:
    """Look at what is new in the journal, once, now: streams, alarms and what they do; then the reports."""
    from monitoring.monitor import Monitor

    places = read_places()
    params = read_params(places)
    if task:
        params.task(task)
    monitor = Monitor(places, params)
    done = monitor.pass_once()
    rows = monitor.report((task,) if task else (), (site,) if site else ()) if reports else []
    if as_json:
        told = {"rows": done.rows, "alarms": [asdict(alarm) for alarm in done.alarms],
                "estimates": len(done.estimates), "verdicts": [asdict(row) for row in rows]}  # fmt: skip
        click.echo(json.dumps(told))
        return
    click.echo(f"{done.rows} new rows, {len(done.alarms)} alarms, {len(done.estimates)} estimates.")
    _print_alarms(done.alarms)
    _print(rows, as_json)


@monitoring.command()
def watch() -> None:
    """Go on looking until stopped."""
    from monitoring.monitor import Monitor

    places = read_places()
    Monitor(places, read_params(places)).watch()


@monitoring.command()
@TASK
@SITE
@click.option("--limit", default=20, show_default=True, help="At most this many rows, the newest.")
@AS_JSON
def alarms(task: str | None, site: str | None, limit: int, as_json: bool) -> None:
    """The newest alarms; the ledger says what each did."""
    from monitoring.records import Alarm, open_records

    rows = open_records(read_places().var).read(Alarm, task, site, limit=limit)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    _print_alarms(rows)


@monitoring.command()
@AS_JSON
def status(as_json: bool) -> None:
    """Each version at each site: what moved, alarms, and how right it is, as far as anybody knows."""
    from monitoring.overview import read_overviews
    from registry.ledger import open_ledger

    places = read_places()
    ledger = open_ledger(places.var)
    serving = {(task, site): one.version for task in read_params(places).tasks
               for site, one in ledger.champions(task).items()}  # fmt: skip
    told = read_overviews(places.var, serving)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in told.values()]))
        return
    rows = [[one.task, one.site, f"v{one.version}", str(one.subjects), f"{one.combined.get('score', 0):.2f}",
             str(len(one.alarms)), one.estimate.body["verdict"] if one.estimate else "-",
             tell_share(one.estimate.body["estimated"].get("accuracy")) if one.estimate else "-"]
            for _, one in sorted(told.items())]  # fmt: skip
    head = ["task", "site", "version", "subjects", "score (1: limit)", "alarms", "accuracy", "estimated"]
    print_table("What is watched", head, rows)


@monitoring.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@TASK
@SITE
def export(path: Path, task: str | None, site: str | None) -> None:
    """Write the journal into PATH, a parquet file: one row a prediction, its columns as columns."""
    from monitoring.parquet import export_journal

    count = export_journal(read_places().var, path, task, site)
    click.echo(f"{count} predictions are in {path}.")


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


def tell_share(told: dict[str, float] | None) -> str:
    """A share and its interval; `-` where there is none."""
    return f"{told['estimate']:.2f} [{told['low']:.2f} {told['high']:.2f}]" if told else "-"


def _print_alarms(rows: list[Any]) -> None:
    print_table("Alarms", ["#", "when (UTC)", "task", "site", "version", "what"],
                [[str(row.seq or "new"), row.at[:19], row.task, row.site, f"v{row.version}", row.detail]
                 for row in rows])  # fmt: skip


def _print(rows: list[VerdictRow], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    print_table("Drift verdicts", ["task", "site", "version", "subjects", "verdict", "detail"],
                [[row.task, row.site, f"v{row.version}", str(row.subjects), row.verdict, row.detail]
                 for row in rows])  # fmt: skip
