"""What the demo shows at its end: a table for the terminal and an index page for the browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from imaging.config import Places
from monitoring.records import Alarm, open_records
from registry.card import present
from registry.ledger import open_ledger
from registry.policy import read_policy

TEMPLATE = Path(__file__).parent / "templates" / "demo.html"


def interval(score: list[float] | None) -> str:
    """`.84 [.76 .90]`, or `1.00 [.97 1.00]`."""
    if score is None:
        return "-"
    middle, low, high = (f"{value:.2f}".removeprefix("0") for value in score)
    return f"{middle} [{low} {high}]"


def read_alarms(var: Path, after: int) -> dict[tuple[str, str], list[str]]:
    """(task, site) -> what each alarm says, of those that rest on rows of the journal after this one."""
    found: dict[tuple[str, str], list[str]] = {}
    for alarm in open_records(var).read(Alarm):
        if alarm.last_seq > after:
            found.setdefault((alarm.task, alarm.site), []).append(alarm.detail)
    return found


def headline(told: dict[str, Any]) -> list[str]:
    """The metrics worth a column: those that the policy bounds."""
    return list(read_policy(told["task"]).network.low)


def write_pages(places: Places, told: dict[str, Any]) -> dict[str, str]:
    """Write var/report/index.html and the pages it links to.

    Returns:
        What each page is -> its path.
    """
    from jinja2 import Environment

    folder, ledger = places.var / "report", open_ledger(places.var)
    links: dict[str, dict[str, str]] = {}
    for task in told:
        (folder / task).mkdir(parents=True, exist_ok=True)
        shutil.copy(places.stage(task, "evaluate") / "report.html", folder / task / "evaluation.html")
        policy = read_policy(task, places.policies)
        (folder / task / "card.html").write_text(present(ledger, places.var, policy, told[task]["version"]))
        found = sorted((folder / task).glob("drift-*.html"))
        links[task] = {page.stem.removeprefix("drift-"): f"{task}/{page.name}" for page in found}
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text())
    metrics = {task: headline(facts) for task, facts in told.items()}
    index = folder / "index.html"
    index.write_text(template.render(tasks=told, metrics=metrics, links=links, interval=interval))
    pages = {
        f"drift {task} {site}": str(folder / page) for task in links for site, page in links[task].items()
    }
    kinds = {f"{kind} {task}": str(folder / task / f"{kind}.html")
             for task in told for kind in ("card", "evaluation")}  # fmt: skip
    return {"index": str(index), **kinds, **pages}


def print_table(console: Any, result: dict[str, Any], places: Places) -> None:
    """Print the table of task x site, a line for each site that needs one, and where to look next."""
    from rich.table import Table

    for task, told in result["tasks"].items():
        metrics = headline(told)
        table = Table(title=f"{task} v{told['version']}", title_justify="left", box=None, header_style="bold")
        for name in ("site", *metrics, "gate", "drift", "answers", "p50 / p99 ms"):
            table.add_column(name.replace("_", " "))
        for site, scores in told["sites"].items():
            table.add_row(site, *(interval(scores.get(name)) for name in metrics), *_tail(told, site))
        console.print()
        console.print(table)
        for site in told["sites"]:
            for note in _notes(told, site):
                console.print(f" {site}: {note}", highlight=False)
    console.print(
        f"\nResearch use only; simulated sites, see data/README.md. Took {result['seconds']:.0f} s."
    )
    rows = {"What to look at": result["reports"]["index"], "For machines": places.var / "demo.json",
            "What to try": "make up; formulary services login approver@demo opens the console"}  # fmt: skip
    for name, value in rows.items():
        console.print(f"{name:<16} {_short(value)}", highlight=False, soft_wrap=True)


def _tail(told: dict[str, Any], site: str) -> tuple[str, ...]:
    served = told["served"][site]
    gate = f"approved v{served['version']}" if told["gate"][site]["passed"] else "[red]refused[/]"
    drift = "[red]DRIFT[/]" if told["drift"][site] else told["drift_verdict"][site]
    spent = f"{served['p50_ms']:.0f} / {served['p99_ms']:.0f}" if served["answers"] else "-"
    return gate, drift, str(served["answers"]), spent


def _notes(told: dict[str, Any], site: str) -> list[str]:
    """What went wrong at a site, in words."""
    gate = told["gate"][site]
    refused = [] if gate["passed"] else ["refused, " + "; ".join(gate["reasons"])]
    drift = [f"drift, {told['drift_detail'][site]}"] if told["drift"][site] else []
    alarms = told["alarms"][site]
    more = f"; {len(alarms) - 1} more" if alarms[1:] else ""
    return refused + drift + [f"alarm: {alarm}{more}" for alarm in alarms[:1]]


def _short(value: Any) -> str:
    path = Path(str(value))
    return (
        str(path.relative_to(Path.cwd()))
        if path.is_absolute() and path.is_relative_to(Path.cwd())
        else str(value)
    )
