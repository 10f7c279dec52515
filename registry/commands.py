"""`formulary registry ...`: read the configuration, call one function, print."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from imaging.config import read_params, read_places, read_sites
from imaging.errors import FormularyError
from imaging.terminal import print_table
from imaging.vocabulary import Scope
from registry.decision_commands import (
    AS_JSON,
    BECAUSE,
    IDENTITY,
    make_commands,
    open_audit,
    open_registry,
    print_events,
    tell_interval,
)
from registry.package import shelf


@click.group(commands=make_commands())
def registry() -> None:
    """Versions, evidence and the decisions about them."""


@registry.group()
def keys() -> None:
    """Keys that sign versions and decisions."""


@keys.command("create")
@IDENTITY
@click.option(
    "--by", default=None, help="The trusted identity that vouches. Default: the first one with a key here."
)
@click.option("--attests", is_flag=True, help="It signs for the persons that tokens name (roles.yaml).")
def create_key(identity: str | None, by: str | None, attests: bool) -> None:
    """Make a key for an identity and let the ledger trust it. A ledger's first key vouches for itself."""
    from registry.access import act, admit, name_identity, read_roles

    places, ledger = open_registry()
    if read_roles(places) and ledger.trusted_keys():
        by = act(places, ledger, by, Scope.KEYS).identity
    signer = admit(places.var, ledger, name_identity(identity), by, attests)
    click.echo(f"{signer.identity} signs with key {signer.key_id}, kept in {places.var / 'keys'}.")


@keys.command("list")
@AS_JSON
def list_keys(as_json: bool) -> None:
    """Keys that the ledger trusts now."""
    _, ledger = open_registry()
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

    places, ledger = open_registry()
    revoke(ledger, key, act(places, ledger, identity, Scope.KEYS), because)
    click.echo(f"Key {key} is not trusted any more: what it signs from now on is refused.")


@keys.command("rotate")
@IDENTITY
@BECAUSE
def rotate_key(identity: str | None, because: str) -> None:
    """Give an identity a new key and revoke the old one; what the old one signed holds on."""
    from registry.access import name_identity, rotate

    places, ledger = open_registry()
    signer = rotate(places.var, ledger, name_identity(identity), because)
    click.echo(f"{signer.identity} signs with key {signer.key_id} from now on.")


@keys.command("export")
@IDENTITY
def export_key(identity: str | None) -> None:
    """Print the public key of an identity, for whoever verifies evidence elsewhere."""
    from registry.access import name_identity

    _, ledger = open_registry()
    name = name_identity(identity)
    click.echo(
        "".join(key.public for key in ledger.trusted_keys().values() if key.identity == name), nl=False
    )


@registry.command()
@click.option(
    "--task", "tasks", multiple=True, help="A task; may be given again. Default: all of params.yaml."
)
@IDENTITY
def register(tasks: tuple[str, ...], identity: str | None) -> None:
    """Sign what the pipeline made, give it a version, mirror it to MLflow. Again changes nothing."""
    from registry.access import act
    from registry.mirror import mirror_versions
    from registry.registration import register as register_version

    places, ledger = open_registry()
    signer, params = act(places, ledger, identity, Scope.REGISTER), read_params(places)
    for task in tasks or params.tasks:
        params.task(task)
        made = register_version(places, ledger, task, signer)
        click.echo(f"{task} v{made.version} {made.did}  {made.digest[:19]}")
        logged = mirror_versions(places, ledger, task)
        if logged:
            click.echo(f"{task}: MLflow has {', '.join(f'v{number}' for number in logged)} now")


@registry.command("list")
@click.option("--task", default=None, help="Only this task.")
@IDENTITY
@AS_JSON
def list_versions(task: str | None, as_json: bool, identity: str | None) -> None:
    """Versions, and where each one serves."""
    _, ledger = open_audit(identity)
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
@IDENTITY
@AS_JSON
def show(task: str, version: int, as_json: bool, identity: str | None) -> None:
    """What is known of VERSION of TASK: contract, evidence, decisions."""
    from registry.evidence import verify_package

    places, ledger = open_audit(identity)
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
    rows = [[site, *(tell_interval(told.get(metric)) for metric in metrics)]
            for site, told in {"overall": scores["overall"], **scores["sites"]}.items()]  # fmt: skip
    print_table("Locked test sets, 95 % intervals by subject", ["site", *metrics], rows)
    print_events([event for event in ledger.events(task) if event.body.get("version") == version])


@registry.group()
def policy() -> None:
    """The bounds that a version must meet."""


@policy.command("check")
@click.argument("task")
@IDENTITY
@AS_JSON
def check_policy(task: str, as_json: bool, identity: str | None) -> None:
    """Read the policy of TASK and say it in plain sentences, with its power on the cohort at hand."""
    from registry.evidence import verify_package
    from registry.policy import explain_policy, read_policy
    from registry.power import estimate_power, explain_power

    places, ledger = open_audit(identity)
    found, versions = read_policy(task, places.policies), ledger.versions(task)
    told, power = explain_policy(found), None
    if versions:  # the newest one's predictions are the cohort at hand
        evidence = verify_package(shelf(places.var, versions[-1][2]), ledger)
        power = estimate_power(found, evidence, read_sites(places))
        told += explain_power(power)
    else:
        told.append("No version is registered, so there is no cohort to tell the power on.")
    if as_json:
        click.echo(json.dumps({**found.model_dump(mode="json"), "power": power}))
        return
    for sentence in told:
        click.echo(f"- {sentence}")


@policy.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of a policy, for editors."""
    from registry.policy import policy_schema

    click.echo(json.dumps(policy_schema(), indent=1))


@registry.command()
@click.argument("task")
@click.argument("version", type=int)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="Write to this file instead of the terminal.")  # fmt: skip
@IDENTITY
@AS_JSON
def card(task: str, version: int, out: Path | None, as_json: bool, identity: str | None) -> None:
    """The model card of VERSION of TASK, as a page or as JSON."""
    from registry.card import present
    from registry.policy import read_policy

    places, ledger = open_audit(identity)
    text = present(ledger, places.var, read_policy(task, places.policies), version, as_json)
    if out:
        out.write_text(text)
    else:
        click.echo(text)


@registry.command()
@click.option("--watch", is_flag=True, help="Go on until stopped, looking every two seconds.")
def mirror(watch: bool) -> None:
    """Carry decisions to MLflow's aliases."""
    from registry.mirror import drain

    places, ledger = open_registry()
    if not watch:
        click.echo("\n".join(drain(places, ledger)))
    last: list[str] = []
    while watch:
        try:
            told = drain(places, ledger)
        except FormularyError as error:
            told = [str(error)]
        click.echo("".join(f"{line}\n" for line in told if line not in last), nl=False)
        last = told
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
