"""`formulary registry ...`: read the configuration, call one function, print."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import click

from imaging.config import Places, read_params, read_places, read_sites
from imaging.errors import FormularyError
from imaging.terminal import print_table
from registry.events import Event
from registry.ledger import Ledger, open_ledger
from registry.package import shelf

IDENTITY = click.option(
    "--identity", default=None, help="Who acts. Default: FORMULARY_IDENTITY, else your OS user."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
BECAUSE = click.option("--because", required=True, help="Why, in a sentence; it stands in the ledger.")


@click.group()
def registry() -> None:
    """Versions, evidence and the decisions about them."""


def _open() -> tuple[Places, Ledger]:
    places = read_places()
    return places, open_ledger(places.var)


@registry.group()
def keys() -> None:
    """Keys that sign versions and decisions."""


@keys.command("create")
@IDENTITY
@click.option(
    "--by", default=None, help="The trusted identity that vouches. Default: the first one with a key here."
)
def create_key(identity: str | None, by: str | None) -> None:
    """Make a key for an identity and let the ledger trust it. A ledger's first key vouches for itself."""
    from registry.access import admit, name_identity

    places, ledger = _open()
    signer = admit(places.var, ledger, name_identity(identity), by)
    click.echo(f"{signer.identity} signs with key {signer.key_id}, kept in {places.var / 'keys'}.")


@keys.command("list")
@AS_JSON
def list_keys(as_json: bool) -> None:
    """Keys that the ledger trusts now."""
    _, ledger = _open()
    trusted = list(ledger.trusted_keys().values())
    if as_json:
        click.echo(json.dumps([vars(key) for key in trusted]))
    else:
        print_table("Trusted keys", ["identity", "key"], [[key.identity, key.key] for key in trusted])


@keys.command("revoke")
@click.argument("key")
@IDENTITY
@BECAUSE
def revoke_key(key: str, identity: str | None, because: str) -> None:
    """Stop trusting KEY, an id that `keys list` shows."""
    from registry.access import act, revoke

    places, ledger = _open()
    revoke(ledger, key, act(places.var, ledger, identity), because)
    click.echo(f"Key {key} is not trusted any more. Statements it signed are refused from now on.")


@registry.command()
@click.option(
    "--task", "tasks", multiple=True, help="A task; may be given again. Default: all of params.yaml."
)
@IDENTITY
def register(tasks: tuple[str, ...], identity: str | None) -> None:
    """Sign what the pipeline made, give it a version, mirror it to MLflow. Again changes nothing."""
    from registry.access import act
    from registry.promotion import register as register_version
    from registry.store import mirror_versions

    places, ledger = _open()
    signer, params = act(places.var, ledger, identity), read_params(places)
    for task in tasks or params.tasks:
        params.task(task)
        made = register_version(places, ledger, task, signer)
        click.echo(f"{task} v{made.version} {made.did}  {made.digest[:19]}")
        logged = mirror_versions(places.var, ledger, task)
        if logged:
            click.echo(f"{task}: MLflow has {', '.join(f'v{number}' for number in logged)} now")


@registry.command("list")
@click.option("--task", default=None, help="Only this task.")
@AS_JSON
def list_versions(task: str | None, as_json: bool) -> None:
    """Versions, and where each one serves."""
    _, ledger = _open()
    rows: list[dict[str, Any]] = []
    for name, number, digest, event in ledger.versions(task):
        sites = sorted(site for site, held in ledger.champions(name).items() if held.digest == digest)
        rows.append({"task": name, "version": number, "digest": digest, "at": event.at, "author": event.actor,
                     "champion_at": sites})  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows))
        return
    print_table("Versions", ["task", "version", "registered", "author", "champion at", "digest"],
           [[row["task"], f"v{row['version']}", row["at"][:16], row["author"],
             ", ".join(row["champion_at"]) or "nowhere", row["digest"][7:19]] for row in rows])  # fmt: skip


@registry.command()
@click.argument("task")
@click.argument("version", type=int)
@AS_JSON
def show(task: str, version: int, as_json: bool) -> None:
    """What is known of VERSION of TASK: contract, evidence, decisions."""
    from registry.evidence import verify_package

    places, ledger = _open()
    digest, _ = ledger.version(task, version)
    evidence = verify_package(shelf(places.var, digest), ledger)
    if as_json:
        click.echo(
            json.dumps({"digest": digest, "signed_by": evidence.signed_by, "statements": evidence.statements})
        )
        return
    made, scores = evidence.statements["package"], evidence.statements["evaluation"]
    click.echo(
        f"{task} v{version}  {digest}\ncommit {made['commit']}  signed by {evidence.signed_by['package']}"
    )
    metrics = list(scores["overall"])
    rows = [[site, *(_interval(told.get(metric)) for metric in metrics)]
            for site, told in {"overall": scores["overall"], **scores["sites"]}.items()]  # fmt: skip
    print_table("Locked test sets, 95 % intervals by subject", ["site", *metrics], rows)
    _print_events([event for event in ledger.events(task) if event.body.get("version") == version])


def _interval(score: dict[str, Any] | None) -> str:
    return f"{score['estimate']:.2f} [{score['low']:.2f} {score['high']:.2f}]" if score else "-"


@registry.group()
def policy() -> None:
    """The bounds that a version must meet."""


@policy.command("check")
@click.argument("task")
@AS_JSON
def check_policy(task: str, as_json: bool) -> None:
    """Read the policy of TASK and say it in plain sentences."""
    from registry.gates import explain_policy, read_policy

    found = read_policy(task)
    if as_json:
        click.echo(found.model_dump_json())
        return
    for sentence in explain_policy(found):
        click.echo(f"- {sentence}")


@registry.command()
@click.argument("task")
@click.argument("version", type=int)
@click.option("--dry-run", is_flag=True, help="Say the verdict and write nothing.")
@IDENTITY
@AS_JSON
def promote(task: str, version: int, dry_run: bool, identity: str | None, as_json: bool) -> None:
    """Ask for VERSION of TASK: the gate judges it, site by site. A second person approves."""
    from registry.access import act
    from registry.evidence import verify_package
    from registry.gates import digest_policy, judge, read_policy
    from registry.promotion import request

    places, ledger = _open()
    judged = (read_policy(task), digest_policy(task), read_sites(places))
    digest, event = ledger.version(task, version)
    if dry_run:
        verdict, asked = judge(verify_package(shelf(places.var, digest), ledger), judged[0], judged[2]), None
    else:
        verdict, asked = request(ledger, places.var, event, judged, act(places.var, ledger, identity))
    if as_json:
        click.echo(json.dumps({**verdict.model_dump(mode="json"), "asked": asked.seq if asked else None}))
        return
    rows = [[name, "ok" if found.passed else "REFUSED", "; ".join(found.reasons)]
            for name, found in {"network": verdict.network, **verdict.sites}.items()]  # fmt: skip
    print_table(f"{task} v{version} -> champion", ["where", "gate", "reasons"], rows)
    if asked:
        click.echo(f"Waits for a second person: formulary registry approve {task} {version} --because ...")
    else:
        click.echo("Nothing has changed." if dry_run else "It is champion at each of these sites already.")


@registry.command()
@click.argument("task")
@click.argument("version", type=int)
@BECAUSE
@IDENTITY
def approve(task: str, version: int, because: str, identity: str | None) -> None:
    """Agree to VERSION of TASK, which somebody else asked for: it serves at the sites that passed."""
    from registry.access import act
    from registry.promotion import approve as agree

    places, ledger = _open()
    sites = agree(ledger, places.var, task, version, (act(places.var, ledger, identity), because))
    click.echo(f"{task} v{version} is champion at {', '.join(sites)}.")


@registry.command()
@click.argument("task")
@click.option("--site", default=None, help="Only this site. Default: wherever there is a previous version.")
@BECAUSE
@IDENTITY
def rollback(task: str, site: str | None, because: str, identity: str | None) -> None:
    """Put the previous champion of TASK back. One person suffices."""
    from registry.access import act
    from registry.promotion import roll_back

    places, ledger = _open()
    moved = roll_back(ledger, places.var, task, site, (act(places.var, ledger, identity), because))
    for name, version in moved.items():
        click.echo(f"{'network' if name == '*' else name}: {task} v{version} serves again")


@registry.command()
@click.argument("task", required=False)
@AS_JSON
def history(task: str | None, as_json: bool) -> None:
    """Every decision, oldest first; of TASK, if one is named."""
    _, ledger = _open()
    events = ledger.events(task)
    if as_json:
        click.echo(json.dumps([vars(event) for event in events]))
    else:
        _print_events(events)


def _version(event: Event) -> str:
    return f"v{event.body['version']}" if "version" in event.body else ""


def _print_events(events: list[Event]) -> None:
    rows = [[str(event.seq), event.at[:19], event.task, event.kind, _version(event),
             event.actor, ", ".join(event.body.get("sites", [])),
             str(event.body.get("because") or event.body.get("fact") or "")] for event in events]  # fmt: skip
    print_table("Ledger", ["#", "when (UTC)", "task", "decision", "version", "by", "sites", "because"], rows)


@registry.command()
def verify() -> None:
    """Read the ledger and every package again and name the first thing that does not hold."""
    from registry.evidence import verify_package

    places, ledger = _open()
    count = ledger.verify()
    versions = ledger.versions()
    for _, _, digest, _ in versions:
        verify_package(shelf(places.var, digest), ledger)
    click.echo(f"{count} events and {len(versions)} packages hold.")


@registry.command()
@click.option("--watch", is_flag=True, help="Go on until stopped, looking every two seconds.")
def mirror(watch: bool) -> None:
    """Carry decisions to MLflow's aliases."""
    from registry.store import drain

    places, ledger = _open()
    if not watch:
        click.echo("\n".join(drain(places.var, ledger)))
    while watch:
        try:
            click.echo("".join(f"{line}\n" for line in drain(places.var, ledger)), nl=False)
        except FormularyError as error:
            click.echo(str(error), err=True)
        time.sleep(2)


@registry.command()
@click.option("--port", default=5000, show_default=True, help="On 127.0.0.1.")
def serve(port: int) -> None:
    """Run the MLflow server on loopback, over var/mlflow."""
    from registry.store import open_store, server_command

    places = read_places()
    open_store(places.var)
    command = server_command(places.var, port)
    os.execvp(command[0], command)
