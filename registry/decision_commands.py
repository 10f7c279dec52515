"""The commands of `registry.actions`, and of what leaves the house and comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from imaging.config import Places, explain, read_places
from imaging.errors import ConfigError, DataError
from imaging.terminal import print_table
from imaging.vocabulary import Decision, Scope
from registry.access import Acting, Desk, act, read_roles
from registry.actions import ACTIONS, Action, perform
from registry.events import Event
from registry.ledger import Ledger, open_ledger
from registry.trials.table import show_trial

IDENTITY = click.option(
    "--identity", default=None, help="Who acts. Default: FORMULARY_IDENTITY, else your OS user."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
BECAUSE = click.option("--because", required=True, help="Why, in a sentence; it stands in the ledger.")


def open_registry() -> tuple[Places, Ledger]:
    """The checkout's places and its ledger."""
    places = read_places()
    return places, open_ledger(places.var)


def open_audit(identity: str | None, scope: Scope = Scope.READ_AUDIT) -> tuple[Places, Ledger]:
    """As `open_registry`, where roles.yaml says who may: for whoever has the scope."""
    places, ledger = open_registry()
    if read_roles(places):
        act(places, ledger, identity, scope)
    return places, ledger


def make_commands() -> list[click.Command]:
    """Every command of this file."""
    names = {command.name for command in OWN}
    return [*OWN, *(make_command(action) for action in ACTIONS.values() if action.name not in names)]


def make_command(action: Action) -> click.Command:
    """The command of an action: its arguments are those of its model."""

    def run(identity: str | None, as_json: bool, **given: Any) -> None:
        run_action(action, identity, as_json, given)

    params: list[click.Parameter] = [_make_parameter(name, field) for name, field
                                     in action.arguments.model_fields.items()]  # fmt: skip
    command = click.Command(action.name, callback=run, params=params, help=action.help)
    return AS_JSON(IDENTITY(command))


def run_action(action: Action, identity: str | None, as_json: bool, given: dict[str, Any]) -> None:
    """Do what the command line asks, and print what came of it."""
    places, ledger = open_registry()
    told = {name: value for name, value in given.items() if value is not None}
    try:
        asked = action.arguments(**told)
    except ValidationError as error:
        raise ConfigError(f"{explain(error, action.arguments)}.", f"See {action.name} --help.") from error
    desk = Desk(places, ledger)
    looks = action.reads or getattr(asked, "dry_run", False)
    if not looks or read_roles(places):
        signer = act(places, ledger, identity, action.scope)
        desk = Acting(places, ledger, signer, getattr(asked, "because", ""))
    told = perform(action, desk, asked)
    if as_json:
        click.echo(json.dumps(told))
    else:
        SHOWN.get(action.name, _show_told)(told)


def _make_parameter(name: str, field: Any) -> click.Parameter:
    if name in ("task", "version", "first", "second", "draft"):
        kind = str if name in ("task", "draft") else int
        return click.Argument([name], type=kind, required=field.is_required())
    if name == "sites":
        return click.Option(["--site", "sites"], multiple=True, help=field.description)
    option = f"--{name.replace('_', '-')}"
    return click.Option([option], required=field.is_required(), is_flag=field.annotation is bool,
                        help=field.description)  # fmt: skip


def _show_told(told: dict[str, Any]) -> None:
    click.echo(told["told"])


def _show_verdict(told: dict[str, Any]) -> None:
    found = {"network": told["network"], **told["sites"]}
    rows = [[site, one["metric"], f"{one['low']:+.3f}", one["against"], f"-{one['margin']:g}",
             "not worse" if one["passed"] else "WORSE"]
            for site, finding in found.items() for one in finding["comparisons"]]  # fmt: skip
    if rows:
        heads = ["where", "metric", "may be as low as", "against", "margin", "verdict"]
        print_table("Differences, by subject", heads, rows)
    print_table("The gate", ["where", "verdict", "reasons"],
                [[site, "ok" if finding["passed"] else "REFUSED", "; ".join(finding["reasons"])]
                 for site, finding in found.items()])  # fmt: skip
    for name, use in told["uses"].items():
        click.echo(f"{name} set {use['digest'][:19]}: use {use['use']} of {use['of']}, "
                   f"bounds at {100 * use['confidence']:.1f} %")  # fmt: skip
    click.echo(told["told"])


def _show_difference(told: dict[str, Any]) -> None:
    facts = [[path, *map(str, pair)] for path, pair in told["facts"].items()]
    print_table("What differs", ["where", "first", "second"], facts)
    print_table("Scores", ["where", "metric", "first", "second"],
                [[place, metric, *map(tell_interval, pair)] for place, scores in told["scores"].items()
                 for metric, pair in scores.items()])  # fmt: skip


def _show_history(told: dict[str, Any]) -> None:
    print_events([Event(**event) for event in told["events"]])


SHOWN = {
    "trial-report": show_trial,
    "end-trial": show_trial,
    "request": _show_verdict,
    "promote": _show_verdict,
    "diff": _show_difference,
    "history": _show_history,
}


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--accept-loss", default="", help="Why records that only the exported head knows may stay lost."
)
@IDENTITY
def restore(file: Path, accept_loss: str, identity: str | None) -> None:
    """Put back what a backup FILE has and the ledger lacks; nothing that is here gives way."""
    from registry.custody import restore as put_back

    places, ledger = open_registry()
    # an empty ledger knows nobody yet
    signer = act(places, ledger, identity, Scope.PROMOTE) if ledger.trusted_keys() else None
    told = put_back(places, ledger, file, signer, accept_loss)
    click.echo(f"{told['events']} events and {told['packages']} packages were put back.")


@click.command()
@click.argument("task")
@click.argument("version", type=int)
@click.argument("file", type=click.Path(path_type=Path))
@BECAUSE
@IDENTITY
def export(task: str, version: int, file: Path, because: str, identity: str | None) -> None:
    """Write VERSION of TASK with its evidence and decisions into FILE, to be verified elsewhere."""
    from registry.custody import export as write

    places, ledger = open_registry()
    acting = Acting(places, ledger, act(places, ledger, identity, Scope.READ_AUDIT), because)
    click.echo(f"{write(acting, task, version, file)} holds {task} v{version}. "
               "Verify it: formulary registry verify-export FILE --key PUBLIC.pem")  # fmt: skip


@click.command("verify-export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--key", "keys", multiple=True, required=True, type=click.Path(path_type=Path),
              help="A public key (PEM), as `keys export` prints it; may be given again.")  # fmt: skip
@AS_JSON
def verify_export(file: Path, keys: tuple[Path, ...], as_json: bool) -> None:
    """Check an exported FILE with public keys alone; needs no ledger and no network."""
    from registry.custody import verify_export as check

    told = check(file, [pem for path in keys for pem in _split_pems(path)])
    if as_json:
        click.echo(json.dumps(told))
        return
    click.echo(f"{told['digest']} holds.")
    print_table("Statements", ["statement", "signed by"], [list(row) for row in told["statements"].items()])
    print_table("Decisions that these keys signed", ["decision", "by", "when (UTC)"],
                [list(row) for row in told["decisions"]])  # fmt: skip


def _split_pems(path: Path) -> list[str]:
    end = "-----END PUBLIC KEY-----\n"
    try:
        return [part + end for part in path.read_text().split(end) if part.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read.", "Name a PEM file.") from error


def tell_interval(score: dict[str, Any] | None) -> str:
    """An estimate and its interval; `-` where there is none."""
    return f"{score['estimate']:.3f} [{score['low']:.3f} {score['high']:.3f}]" if score else "-"


def _version(event: Event) -> str:
    return f"v{event.body['version']}" if "version" in event.body else ""


def print_events(events: list[Event]) -> None:
    """A table of ledger records."""
    rows = [[str(event.seq), event.at[:19], event.task, event.kind, _version(event),
             event.actor, ", ".join(event.body.get("sites", [])),
             str(event.body.get("because") or event.body.get("fact") or "")] for event in events]  # fmt: skip
    print_table("Ledger", ["#", "when (UTC)", "task", "decision", "version", "by", "sites", "because"], rows)


@click.command("import")
@click.argument("task")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--contract", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=None,
              help="YAML or JSON: what params.yaml, or a bundle's metadata, do not tell.")  # fmt: skip
@click.option("--because", required=True, help="Where it comes from; it stands in the package.")
@IDENTITY
def import_model(task: str, source: Path, contract: Path | None, because: str, identity: str | None) -> None:
    """Convert SOURCE (ONNX, a state dict or a MONAI bundle) for TASK. Nothing of it is run."""
    from registry.imports import import_model as convert

    places, _ = open_audit(identity, Scope.TRAIN)
    made = convert(places, task, source, contract, because)
    click.echo(f"{made}\nNext: formulary training package --task {task} --imported {made}")


@click.command()
@click.argument("task")
@click.argument("version", type=int)
@click.argument("folder", type=click.Path(path_type=Path))
@BECAUSE
@IDENTITY
def bundle(task: str, version: int, folder: Path, because: str, identity: str | None) -> None:
    """Write VERSION of TASK into FOLDER as a MONAI bundle; the ledger records it."""
    from registry.bundles import export_bundle
    from registry.evidence import verify_package
    from registry.package import shelf

    places, ledger = open_registry()
    signer, (digest, _) = act(places, ledger, identity, Scope.READ_AUDIT), ledger.version(task, version)
    verify_package(shelf(places.var, digest), ledger)
    export_bundle(shelf(places.var, digest), folder)
    body = {"version": version, "digest": digest, "what": folder.name, "because": because}
    with ledger.writing() as writer:
        writer.append(Decision.EXPORTED, task, body, signer)
    click.echo(f"{folder} holds {task} v{version}. Run it: python -m monai.bundle run")


OWN: tuple[click.Command, ...] = (restore, export, verify_export, import_model, bundle)
