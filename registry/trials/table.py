"""A trial's report for people: what was compared, the verdict, the numbers, the discordant cases."""

from __future__ import annotations

from typing import Any

import click

from imaging.terminal import print_table

SHOWN = 20  # discordant predictions; --json lists them all
MEASURES = {
    "disagreement": "other finding than the champion",
    "positives": "positive findings, challenger - champion",
    "accuracy": "right answers, challenger - champion (late labels)",
}


def show_trial(told: dict[str, Any]) -> None:
    """Print a report of `registry.trials.report`."""
    plan = told["plan"]
    click.echo(f"Trial {told['trial']} of {told['task']} v{told['version']} since {told['started'][:16]}: "
               f"at most {plan['size']} subjects, margin {plan['margin']:g}, by {plan['endpoint']}, a look "
               f"every {plan['look']} cases. This version had {told['earlier_trials']} trials before. "
               f"It passes at most at sites with {told['needed_at_a_site']} deciding subjects or more.\n"
               f"{told['compared']}\n{told['told']}")  # fmt: skip
    numbers = [[words, tell_estimate(told[name])] for name, words in MEASURES.items()]
    spent = told["milliseconds"] or {}
    numbers += [[f"{name.replace('_', ' ')} ms, median and 99th percentile", f"{one[0]:g}, {one[1]:g}"]
                for name, one in spent.items()]  # fmt: skip
    counts = ("cases", "subjects", "labelled", "without_subject", "dropped")
    numbers += [[name.replace("_", " "), str(told[name])] for name in counts]
    numbers += [[f"failed: {reason}", str(count)] for reason, count in told["failures"].items()]
    print_table("Numbers", ["what", "value"], numbers)
    print_table("By site", ["site", "cases", "subjects", "deciding", "other finding"],
                [[site, str(one["cases"]), str(one["subjects"]), str(told["deciding"].get(site, 0)),
                  tell_estimate(one["disagreement"])]
                 for site, one in told["sites"].items()])  # fmt: skip
    found = told["discordant"]
    print_table(f"Discordant: {len(found)}", ["prediction"], [[one] for one in found[:SHOWN]])
    if len(found) > SHOWN:
        click.echo(f"{len(found) - SHOWN} more: --json")
    if told["running_at"]:
        click.echo(f"It goes on at {', '.join(told['running_at'])}.")


def tell_estimate(told: dict[str, Any] | None) -> str:
    """An estimate and its interval; `-` where there is none."""
    return f"{told['estimate']:+.3f} [{told['low']:+.3f} {told['high']:+.3f}]" if told else "-"
