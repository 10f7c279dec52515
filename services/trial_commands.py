"""`formulary services trial` and `canary`: what serving shows to challengers, and lets them answer."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import click

from imaging.errors import DataError
from registry.access import act
from registry.actions import ACTIONS
from registry.decision_commands import AS_JSON, IDENTITY, make_command, open_registry, run_action
from registry.trials.conduct import TRUTH_SCOPE
from registry.trials.rows import open_rows

PLAN = ACTIONS["trial"].arguments.model_fields


@click.command()
@click.argument("task")
@click.argument("version", type=int, required=False)
@click.option("--size", type=int, help=PLAN["size"].description)
@click.option("--margin", type=float, help=PLAN["margin"].description)
@click.option("--alpha", type=float, help=PLAN["alpha"].description)
@click.option("--endpoint", help=PLAN["endpoint"].description)
@click.option("--look", type=int, help=PLAN["look"].description)
@click.option("--site", "sites", multiple=True, help=PLAN["sites"].description)
@click.option("--because", help=PLAN["because"].description)
@click.option("--report", "--status", is_flag=True, help="Show the newest trial; so does TASK alone.")
@click.option("--stop", is_flag=True, help="End the trial; its verdict stands in the ledger.")
@click.option("--truth", type=click.Path(dir_okay=False, path_type=Path),
              help="Late labels: CSV with the columns prediction (id) and positive (0 or 1).")  # fmt: skip
@IDENTITY
@AS_JSON
def trial(task: str, identity: str | None, as_json: bool, truth: Path | None, **asked: Any) -> None:
    """Try VERSION of TASK beside what serves: it sees every case and answers nobody."""
    stop, looks = asked.pop("stop"), asked.pop("report")
    given = {name: value for name, value in asked.items() if value not in (None, ())}
    if truth:
        places, ledger = open_registry()
        act(places, ledger, identity, TRUTH_SCOPE)
        new, unknown = open_rows(places.var).tell_truth(_read_truths(truth))
        click.echo(f"{new} truths are new.")
        if unknown:
            click.echo(f"No trial has seen {len(unknown)} of the cases, not kept: {', '.join(unknown)}")
    elif stop:
        run_action(ACTIONS["end-trial"], identity, as_json, {"task": task, **given})
    elif looks or not given:
        run_action(ACTIONS["trial-report"], identity, as_json, {"task": task})
    else:
        run_action(ACTIONS["trial"], identity, as_json, {"task": task, **given})


canary = make_command(ACTIONS["canary"])


def _read_truths(path: Path) -> dict[str, bool]:
    try:
        with path.open(newline="") as file:
            return {
                row["prediction"]: {"0": False, "1": True}[row["positive"]] for row in csv.DictReader(file)
            }
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}).", "Columns: prediction, positive (0 or 1)."
        ) from error
