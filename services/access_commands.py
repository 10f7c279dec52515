"""`formulary services serve` and `formulary services keys ...`: who may ask, and where."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from imaging.config import Places, read_places
from imaging.errors import ConfigError
from imaging.terminal import print_table
from imaging.vocabulary import Scope

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
IDENTITY = click.option(
    "--identity", default=None, help="Who acts. Default: FORMULARY_IDENTITY, else your OS user."
)


@click.command()
@click.option("--port", default=3000, show_default=True, help="Where to listen.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="An address; others ask for credentials."
)
@click.option("--certificate", type=click.Path(path_type=Path), default=None, help="PEM; turns TLS on.")
@click.option("--key", type=click.Path(path_type=Path), default=None, help="The certificate's key, PEM.")
@click.option("--plain-http", is_flag=True, help="Go without TLS where others reach it, behind a proxy.")
def serve(port: int, host: str, certificate: Path | None, key: Path | None, plain_http: bool) -> None:
    """Run the gateway until stopped: on loopback, elsewhere only where somebody has a credential."""
    from services.listening import decide_listening

    places = read_places()
    told = decide_listening(places, host, certificate, key, plain_http)
    if told.warning:
        click.echo(f"Warning: {told.warning}", err=True)
    var = places.var.resolve()
    settings = {
        "FORMULARY_ROOT": str(places.root), "FORMULARY_VAR": str(var), "OMP_NUM_THREADS": "1",
        "BENTOML_HOME": str(var / "bentoml"), "BENTOML_DO_NOT_TRACK": "true",
    }  # fmt: skip
    os.environ.update({name: os.environ.get(name, value) for name, value in settings.items()})
    if told.guarded:
        os.environ["FORMULARY_ACCESS"] = "on"
    command = [sys.executable, "-m", "bentoml", "serve", "services.gateway:Gateway", "--port", str(port)]
    os.execv(sys.executable, [*command, *told.options])


@click.group()
def keys() -> None:
    """API keys of those who ask for predictions. Once there is one, every route but health asks for it."""


@keys.command()
@click.option("--site", default=None, help="Whose images it may send: a site of sites.yaml.")
@click.option("--no-site", is_flag=True, help="For what sends no images: Prometheus, a reader of /docs.")
@click.option("--days", default=90, show_default=True, help="How long it holds, at most 366.")
@IDENTITY
def create(site: str | None, no_site: bool, days: int, identity: str | None) -> None:
    """Make a key and print it, once: only its digest is kept."""
    from services.keys import create_key

    if (site is None) != no_site:
        raise ConfigError("A key is for one site, or for none.", "Give --site SITE or --no-site.")
    places, who = _enter(identity, Scope.KEYS)
    made, key = create_key(places, site or "", days, who)
    _tell_once(key, f"holds until {made.expires:%Y-%m-%d} for {site or 'no site'}")


@keys.command("list")
@AS_JSON
def list_keys(as_json: bool) -> None:
    """Every key that was made: whose it is and whether it holds; never the key itself."""
    from services.keys import PREFIX, read_keys

    held = read_keys(read_places().var)
    if as_json:
        click.echo(json.dumps([{**key.model_dump(mode="json", exclude={"digest"}), "holds": key.holds}
                               for key in held]))  # fmt: skip
        return
    heads = ["key", "site", "made by", "made (UTC)", "until (UTC)", "holds", "followed by"]
    print_table("API keys", heads, [
        [f"{PREFIX}{key.id}", key.site or "-", key.made_by, f"{key.created:%Y-%m-%d %H:%M}",
         f"{key.revoked or key.expires:%Y-%m-%d %H:%M}", "yes" if key.holds else "NO", key.replaced_by]
        for key in held
    ])  # fmt: skip


@keys.command()
@click.argument("key")
@click.option("--grace-hours", default=24, show_default=True, type=click.IntRange(0, 720),
              help="How long the old key goes on holding.")  # fmt: skip
@IDENTITY
def rotate(key: str, grace_hours: int, identity: str | None) -> None:
    """Make the key that follows KEY, for the same site and as long, and print it, once."""
    from services.keys import rotate_key

    places, who = _enter(identity, Scope.KEYS)
    made, secret = rotate_key(places, key, grace_hours, who)
    _tell_once(secret, f"holds until {made.expires:%Y-%m-%d}; the old one for {grace_hours} hours more")


@keys.command()
@click.argument("key")
@IDENTITY
def revoke(key: str, identity: str | None) -> None:
    """Withdraw KEY at once; running gateways follow within a second."""
    from services.keys import PREFIX, revoke_key

    places, who = _enter(identity, Scope.KEYS)
    gone = revoke_key(places, key, who)
    click.echo(f"{PREFIX}{gone.id} is refused from now on.")


@keys.command()
@click.option("--last", default=50, show_default=True, help="How many rows.")
@AS_JSON
@IDENTITY
def audit(last: int, as_json: bool, identity: str | None) -> None:
    """Who came in, who was turned away, and what became of keys."""
    from monitoring.logins import read_logins

    rows = read_logins(_enter(identity, Scope.READ_AUDIT)[0].var, last)
    if as_json:
        click.echo(json.dumps(rows))
    else:
        heads = ["at", "who", "site", "outcome", "address", "count"]
        print_table("Access", heads, [[str(row[head]) or "-" for head in heads] for row in rows])


def _enter(identity: str | None, scope: Scope) -> tuple[Places, str]:
    """The checkout, and who acts: where roles.yaml says who may, somebody who may."""
    from registry.access import act, name_identity, read_roles
    from registry.ledger import open_ledger

    places = read_places()
    if not read_roles(places):
        return places, name_identity(identity)
    return places, act(places, open_ledger(places.var), identity, scope).actor


def _tell_once(key: str, about: str) -> None:
    """The key alone on standard output, for a pipe; the rest beside it."""
    click.echo(f"It {about}. It is not kept here and not shown again:", err=True)
    click.echo(key)
