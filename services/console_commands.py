"""`formulary services login`: a link that opens the console."""

from __future__ import annotations

import os

import click

from imaging.config import read_places


@click.command()
@click.argument("identity")
@click.option("--port", type=int, default=None, help="Of the gateway. Default: GATEWAY_PORT, else 3000.")
@click.option(
    "--address", default=None, help="Of the console, where it is not on loopback: https://HOST:PORT."
)
def login(identity: str, port: int | None, address: str | None) -> None:
    """Print a link that opens the console as IDENTITY, once, within five minutes. It needs the key here."""
    from registry.access import name_identity
    from registry.ledger import open_ledger
    from services.console.sessions import Sessions

    places = read_places()
    code = Sessions(places, open_ledger(places.var)).make_link(name_identity(identity))
    port = port or int(os.environ.get("GATEWAY_PORT") or 3000)
    start = (address or f"http://127.0.0.1:{port}").rstrip("/")
    click.echo("It opens the console once, within five minutes:", err=True)
    click.echo(f"{start}/console/login?code={code}")
