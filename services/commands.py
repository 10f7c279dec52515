"""`formulary services ...` and the front door's own commands: read, call one function, print."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import click

from imaging.config import read_params, read_places, read_sites
from imaging.terminal import print_table
from imaging.vocabulary import Scope
from services.access_commands import keys, serve
from services.console_commands import login
from services.trial_commands import canary, trial

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@click.group()
def services() -> None:
    """The HTTP face, and what runs behind it."""


@services.command()
@click.option("--task", required=True, help="The task whose package is checked.")
def qualify(task: str) -> None:
    """Pipeline stage: engines against golden cases, and the real route with every kind of file."""
    from services.qualification import qualify as check

    places = read_places()
    body = check(places, task, read_params(places).task(task))
    rows = [[name, "passed" if told["passed"] else "FAILED", f"{told.get('difference', 0):.0e}",
             str(told.get("crossed", "")), ", ".join(f"{size}: {ms:.2f}" for size, ms in
             body["ms_per_batch"].get(name, {}).items()), told.get("reason", "")]
            for name, told in body["engines"].items()]  # fmt: skip
    heads = ["engine", "", "difference below", "crossings", "ms a batch of", "why not"]
    print_table(f"{task}: engines, {body['best']} is the best here", heads, rows)


services.add_command(serve)
services.add_command(keys)
services.add_command(login)
services.add_command(trial)
services.add_command(canary)


@services.command()
@click.argument("task")
@click.option("--version", type=int, default=None, help="A version that serves somewhere.")
@click.option("--site", default=None, help="The site whose champion it is named after. Default: the network.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Default: var/releases/TASK-vN.")
@click.option("--profile", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True,
              help="Engines in the gateway, or a process for each GPU.")  # fmt: skip
@click.option("--because", default="Released for serving.", help="Why; it stands in the ledger.")
@click.option("--identity", default=None, help="Who acts. Default: FORMULARY_IDENTITY, else your OS user.")
def release(
    task: str,
    version: int | None,
    site: str | None,
    out: Path | None,
    profile: str,
    because: str,
    identity: str | None,
) -> None:
    """Build a Bento that serves TASK without this checkout, with its container and Kubernetes files."""
    from registry.access import Acting, act
    from registry.ledger import open_ledger
    from services.release import Release, build_release, choose

    places = read_places()
    read_params(places).task(task)
    if site:
        read_sites(places).site(site)
    ledger = open_ledger(places.var)
    acting = Acting(places, ledger, act(places, ledger, identity, Scope.READ_AUDIT), because)
    number, digest, packages = choose(acting, task, version, site)
    folder = (out or places.var / "releases" / f"{task}-v{number}").resolve()
    built = build_release(acting, Release(task, number, digest, tuple(sorted(packages)), folder, profile))
    click.echo(f"{built} holds bento/, container/ and kubernetes/ of {task} v{number}.")
    click.echo(f"Serve it: bentoml serve {built / 'bento'}")


@services.command("replay")
@click.argument("number")
@click.argument("file", type=click.Path(path_type=Path))
@AS_JSON
def replay_prediction(number: str, file: Path, as_json: bool) -> None:
    """Answer the prediction with the id NUMBER again: FILE, the recorded package and engine, bit for bit."""
    from services.offline import replay

    told = replay(read_places(), number, file)
    if as_json:
        click.echo(json.dumps(told))
    else:
        click.echo(
            f"{told['task']} v{told['version']} by {told['engine']}, {told['at'][:19]}, {told['site']}"
        )
        click.echo("the same, bit for bit" if told["equal"] else
                   f"NOT the same: {told['recorded'][:12]} then, {told['replayed'][:12]} now")  # fmt: skip
    sys.exit(0 if told["equal"] else 1)


@services.command("list")
@AS_JSON
def list_served(as_json: bool) -> None:
    """Which version serves which site, by the ledger."""
    from registry.ledger import open_ledger

    places = read_places()
    ledger = open_ledger(places.var)
    champions = {task: sorted(ledger.champions(task).items()) for task in read_params(places).tasks}
    rows = [
        {"task": task, "site": site, **asdict(held)}
        for task, sites in champions.items()
        for site, held in sites
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    print_table("Serving", ["task", "site", "version", "since (UTC)"],
                [[str(row["task"]), str(row["site"]), f"v{row['version']}", str(row["since"])[:16]]
                 for row in rows])  # fmt: skip


@services.command("forget-pixels")
@click.argument("site")
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget_pixels(site: str, yes: bool) -> None:
    """Remove the key of SITE's kept pixels, so that no copy of them can be read, and the pixels."""
    from services.vault import forget, read_days

    places = read_places()
    if not yes:
        click.confirm(f"Remove the key and all kept pixels of {site}? There is no way back.", abort=True)
    click.echo(f"{forget(places, site)} images of {site} were removed, and their key.")
    if days := read_days(places).get(site):
        click.echo(f"sites.yaml still has keep_days: {days} there: new ones are kept, under a new key.")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--task", required=True, help="What to ask: a task of params.yaml.")
@click.option("--site", default=None, help="Whose champion answers. Default: the network's.")
@click.option("--version", type=int, default=None, help="A version instead of a champion.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Write the mask as PNG here.")
@AS_JSON
def predict(
    file: Path, task: str, site: str | None, version: int | None, out: Path | None, as_json: bool
) -> None:
    """Answer FILE (.png, .dcm, .nii, .nii.gz, .npy) without a server."""
    from services.offline import predict_file

    places = read_places()
    read_params(places).task(task)
    if site:
        read_sites(places).site(site)
    told = predict_file(places, file, task, site, version)
    if out and "mask" in told:
        out.write_bytes(base64.b64decode(told["mask"]["data"]))
    if as_json:
        click.echo(json.dumps(told))
        return
    click.echo(f"{task} v{told['version']} by {told['engine']} ({told['notice']})")
    for name, value in told.items():
        if name in ("probabilities", "lesions", "positive", "area_px", "area_mm2", "uncertainty"):
            click.echo(f"  {name.replace('_', ' ')}: {value}")


@click.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Check packages, devices, threads, ports, databases, keys and disk, and say what to mend."""
    from services.doctor import examine

    checks = examine(read_places())
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks]))
    else:
        print_table("Doctor", ["", "what", "found", "mend"],
                    [["ok" if check.well else "MEND", check.name, check.told, check.mend * (not check.well)]
                     for check in checks])  # fmt: skip
    sys.exit(0 if all(check.well for check in checks) else 1)


@click.command()
@click.option("--task", "tasks", multiple=True, help="A task; may be given again. Default: TASKS, else all.")
@click.option("--subjects", default=200, show_default=True, help="New subjects that each site sends.")
def demo(tasks: tuple[str, ...], subjects: int) -> None:
    """The main job end to end: pipeline, registry, gate, serving, journal, drift. Stops what it started."""
    from services.demo import Demo

    places = read_places()
    params = read_params(places)
    chosen = tasks or tuple(os.environ.get("TASKS", "").split()) or tuple(params.tasks)
    for task in chosen:
        params.task(task)
    Demo(places, params, read_sites(places), chosen, subjects).run()


@click.command()
def up() -> None:
    """Start the stack of the Procfile on loopback, and leave it running until Ctrl-C."""
    from services.stack import choose_ports, read_processes, stack_environment

    places = read_places()
    ports, missing = choose_ports()
    for name, port in ports.items():
        click.echo(f"{name.removesuffix('_PORT').lower():<12} http://127.0.0.1:{port}")
    for name in missing:
        click.echo(f"{name:<12} is not installed: deploy/debian.sh installs it")
    os.chdir(places.root)
    command = [sys.executable, "-m", "honcho", "start", "-f", "Procfile"]
    command += [name for name in read_processes(places) if name not in missing]
    os.execve(sys.executable, command, stack_environment(ports))


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean(yes: bool) -> None:
    """Remove stage outputs, DVC's cache and all of var but the keys."""
    places = read_places()
    kept = places.var / "keys"
    if not yes:
        click.confirm(f"Remove {places.build}, .dvc/cache and {places.var} except {kept}?", abort=True)
    for path in [places.build, places.root / ".dvc" / "cache", *places.var.glob("*")]:
        if path != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
