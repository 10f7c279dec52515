"""`formulary monitoring size`, `accept` and `retrain`: what a site needs, has of its own, and asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from imaging.config import Places, read_params, read_places, read_sites
from imaging.terminal import print_table

SITE = click.option("--site", required=True, help="A site of sites.yaml.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@click.command()
@click.option("--truth", required=True, type=float, help="The sensitivity (or specificity) that is expected.")
@click.option("--bound", required=True, type=float, help="What is to be shown, e.g. the policy's bound.")
@click.option("--power", default=0.8, show_default=True, help="With what probability it is shown.")
@click.option("--effect", default=1.0, show_default=True, help="Design effect: images a subject are alike.")
@click.option("--share", default=None, type=float, help="Of positives among the cases, for all cases.")
@AS_JSON
def size(truth: float, bound: float, as_json: bool, **asked: Any) -> None:
    """How many positive (or negative) cases show that a site reaches a bound."""
    from monitoring.acceptance import size as count

    cases, share = count(truth, bound, asked["power"], asked["effect"]), asked["share"]
    total = None if share is None else round(cases / share + 0.5)
    if as_json:
        click.echo(json.dumps({"cases": cases, "total": total}))
        return
    click.echo(f"{cases} positives show a sensitivity of {bound:g} with power {asked['power']:g} if it is "
               f"{truth:g} (exact binomial test, one-sided at 5 %); as many negatives, a "
               "specificity.")  # fmt: skip
    if total:
        click.echo(f"Where {share:g} of the cases are positive, {total} cases have so many on average.")


@click.command()
@click.argument("task")
@click.argument("version", type=int)
@SITE
@click.option("--labels", type=click.Path(path_type=Path, exists=True), default=None,
              help="A CSV file with prediction and truth; it is kept like any late labels.")  # fmt: skip
@click.option("--recalibrate/--as-it-is", default=True, show_default=True,
              help="Propose a recalibration, if held-out subjects confirm it.")  # fmt: skip
@click.option("--threshold", is_flag=True, help="Propose a threshold that keeps the contract's sensitivity.")
@click.option("--abstain", type=click.FloatRange(0, 0.5, min_open=True, max_open=True), default=None,
              help="Propose prediction sets, and which share of a class may lack its truth.")  # fmt: skip
@click.option("--subjects", default=200, show_default=True,
              help="The first so many are compared with the reference.")  # fmt: skip
@click.option("--identity", default=None, help="Who makes it; another person stores it. Default: "
              "FORMULARY_IDENTITY, else your OS user.")  # fmt: skip
@AS_JSON
def accept(task: str, version: int, site: str, as_json: bool, **asked: Any) -> None:
    """Look at what VERSION of TASK answered at a site, and draft the site's profile with its evidence."""
    from imaging.vocabulary import Scope
    from monitoring.acceptance import Acceptance, Wishes
    from monitoring.records import open_records
    from registry.access import act
    from registry.evidence import verify_package
    from registry.ledger import open_ledger
    from registry.package import shelf
    from registry.profiles import write_draft

    places = read_places()
    read_sites(places).site(site)
    section, ledger = read_params(places).task(task), open_ledger(places.var)
    signer, records = act(places, ledger, asked["identity"], Scope.PROMOTE), open_records(places.var)
    verify_package(shelf(places.var, ledger.version(task, version)[0]), ledger)
    if asked["labels"]:
        _keep_labels(places, asked["labels"], site)
    sensitivity = section.calibrate.sensitivity if asked["threshold"] else None
    wishes = Wishes(asked["recalibrate"], sensitivity, asked["abstain"], asked["subjects"])
    draft = Acceptance(places, records, ledger, (task, site, version)).draft(wishes).sign(signer)
    name = f"{task}-{site}-v{version}-{draft.evidence['made'][:19].replace(':', '')}.json"
    write_draft(draft, places.var / "profiles" / name)
    if as_json:
        click.echo(json.dumps({"draft": name, **draft.describe()}))
        return
    _show(draft.profile.model_dump(), draft.evidence)
    click.echo(f"Another person stores it: formulary registry profile {task} {name} --because ...")


@click.command()
@click.argument("task")
@SITE
@click.option("--since", default="", help="The first day whose answers count, e.g. 2026-11-02.")
@click.option("--because", required=True, help="Why, in a sentence; it stands in the request.")
@AS_JSON
def retrain(task: str, site: str, since: str, because: str, as_json: bool) -> None:
    """Open a request to train TASK again because of a site: rows, and the command. Nothing is run."""
    from monitoring.records import open_records
    from monitoring.retraining import request_retraining
    from registry.ledger import open_ledger

    places = read_places()
    folder, body = request_retraining(
        places, open_records(places.var), open_ledger(places.var), (task, site),
        {"because": because, "since": since},
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **body}))
        return
    rows, cohort = body["rows"], body["cohort"]
    click.echo(f"{folder}: {rows['count']} answers, {rows['labelled']} with a truth; {cohort['images']} "
               f"images of {cohort['subjects']} subjects of the cohort.")  # fmt: skip
    for one in body["missing"]:
        click.echo(f"Missing: {one}.")
    click.echo(f"When they are there: {body['command']}")


def _keep_labels(places: Places, path: Path, site: str) -> None:
    from monitoring.journal import open_journal
    from monitoring.label_files import import_labels
    from monitoring.labels import Door
    from monitoring.records import open_records

    import_labels(Door(places, open_journal(places.var), open_records(places.var)), path, site)


def _show(profile: dict[str, Any], evidence: dict[str, Any]) -> None:
    known, reference = evidence["labelled"], evidence["reference"]
    rows = [["subjects", str(evidence["sample"]["subjects"])],
            ["with a truth", f"{known['positives']} positive, {known['negatives']} negative"],
            ["embeddings", _tell_reference(reference)],
            ["recalibration", str(evidence["recalibration"]["chosen"])]]  # fmt: skip
    for name, about in (
        ("contract", "as the contract says"),
        ("profile", "with the profile, on held-out subjects"),
    ):
        told = evidence[name]
        rows.append([about, f"{'ok' if told['passed'] else 'NOT SHOWN'}: {'; '.join(told['reasons'])}"])
    print_table("Acceptance", ["what", "found"], rows)
    print_table("The site's own", ["setting", "value"],
                [[name, str(value)] for name, value in profile.items() if name != "number"])  # fmt: skip


def _tell_reference(told: dict[str, Any]) -> str:
    if not told["compared"]:
        return f"not compared: {told['why']}"
    word = "differ from" if told["differs"] else "show no difference from"
    return (f"{told['subjects']} subjects {word} the {told['reference']} of {told['of']} "
            f"(p {told['p']:.3f}, level {told['level']})")  # fmt: skip


COMMANDS = (size, accept, retrain)
