"""`formulary monitoring labels`, `export-statistics` and `card`: truths come in, sums go out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from imaging.config import read_places, read_sites
from imaging.terminal import print_table
from registry.access import act, read_roles
from registry.decision_commands import AS_JSON, IDENTITY
from registry.ledger import open_ledger
from registry.trials.conduct import TRUTH_SCOPE

FILE = click.Path(dir_okay=False, path_type=Path)
SITE = click.option("--site", required=True, help="Whose answers: a site of sites.yaml.")


@click.command()
@click.argument("file", type=FILE)
@SITE
@click.option("--dry-run", is_flag=True, help="Look at every row, and keep nothing.")
@IDENTITY
def labels(file: Path, site: str, dry_run: bool, identity: str | None) -> None:
    """Keep late labels of FILE, a CSV: prediction (id), truth (0 or 1), if wanted reader and reason."""
    from monitoring.journal import open_journal
    from monitoring.label_files import import_labels
    from monitoring.labels import Door
    from monitoring.records import open_records

    places = read_places()
    read_sites(places).site(site)
    if read_roles(places):
        act(places, open_ledger(places.var), identity, TRUTH_SCOPE)
    door = Door(places, open_journal(places.var), open_records(places.var))
    count, new = import_labels(door, file, site, dry_run)
    click.echo(f"{count} labels, {new} of them new{'; nothing was kept' if dry_run else ''}.")


@click.command("export-statistics")
@click.argument("task")
@click.argument("version", type=int)
@click.argument("out", type=FILE)
@SITE
@click.option("--locked", is_flag=True, help="The site's locked images instead of its labelled answers.")
def export_statistics(task: str, version: int, out: Path, site: str, locked: bool) -> None:
    """Write what a cross-site card needs of VERSION of TASK at a site to OUT: no images, no rows."""
    from monitoring.site_exports import export_statistics as export

    places = read_places()
    told = export(places, open_ledger(places.var), (task, version, site), out, locked)
    withheld = "; ".join(f"{name} withheld: {why}" for name, why in told.withheld.items())
    click.echo(f"{out} has the {told.source} cases of {site}. {withheld}".strip())


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--out", default=None, type=FILE, help="Write the card as a page that needs no network.")
@AS_JSON
def card(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare the sites of one version by the FILES that they exported."""
    from monitoring.crosssite import build_card, render_card
    from monitoring.sums import MEANS, SHARES, read_statistics

    told = build_card([read_statistics(path) for path in files])
    if out:
        out.write_text(render_card(told))
    if as_json:
        click.echo(json.dumps(told))
        return
    rows, names = {**told["sites"], "all as one": told["pooled"]}, (*SHARES, *MEANS)
    shown = [
        [site, *(_show(row.get(name), len(told["sites"])) for name in names)] for site, row in rows.items()
    ]
    title = f"{told['task']} v{told['version']}, {told['source']} cases. Research use only."
    print_table(title, ["where", *(name.replace("_", " ") for name in names)], shown)
    for name, one in told["next_site"].items():
        if one:
            word = ", indicative" if one["indicative"] else ""
            click.echo(f"The next site's {name}: {one['next'][0]:.3f} to {one['next'][1]:.3f}{word}.")
    for sentence in told["missing"]:
        click.echo(sentence)


def _show(one: dict[str, Any] | None, sites: int) -> str:
    """An estimate; of several sites as one, how many they are where some withheld it."""
    if not one:
        return "withheld"
    of = len(one.get("sites", ())) or sites
    part = f" ({of} of {sites} sites)" if of < sites else ""
    return f"{one['estimate']:.3f} [{one['low']:.3f} {one['high']:.3f}]{part}"


COMMANDS = (labels, export_statistics, card)
