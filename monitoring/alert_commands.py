"""`formulary monitoring prometheus`, `alertmanager`, `dashboards`: call one function, then start or print."""

from __future__ import annotations

import os
from pathlib import Path

import click

from imaging.config import read_places


@click.command()
@click.option("--port", default=9090, show_default=True, help="On 127.0.0.1.")
@click.option("--gateway", default=3000, show_default=True, envvar="GATEWAY_PORT",
              help="Port of the gateway, or GATEWAY_PORT.")  # fmt: skip
@click.option("--alertmanager", default=9093, show_default=True, envvar="ALERTMANAGER_PORT",
              help="Port of Alertmanager, or ALERTMANAGER_PORT.")  # fmt: skip
@click.option("--interval", default=15, show_default=True, help="Seconds between two looks.")
def prometheus(port: int, gateway: int, alertmanager: int, interval: int) -> None:
    """Run Prometheus on loopback: it asks the gateway, and judges by the rules of deploy/prometheus."""
    from monitoring.alerting import command_prometheus, write_prometheus

    places = read_places()
    config = write_prometheus(places, gateway, alertmanager, interval)
    command = command_prometheus(places, config, port)
    os.execv(command[0], command)


@click.command()
@click.option("--port", default=9093, show_default=True, help="On 127.0.0.1.")
@click.option("--config", type=click.Path(path_type=Path, exists=True), default=None,
              envvar="ALERTMANAGER_CONFIG", help="Who is told, or ALERTMANAGER_CONFIG. Default: deploy/'s, "
              "which tells nobody.")  # fmt: skip
def alertmanager(port: int, config: Path | None) -> None:
    """Run Alertmanager on loopback: it carries alerts to whom its configuration names."""
    from monitoring.alerting import command_alertmanager

    places = read_places()
    chosen = config or places.root / "deploy" / "alertmanager" / "alertmanager.yml"
    command = command_alertmanager(places, chosen.resolve(), port)
    os.execv(command[0], command)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def dashboards(out: Path) -> None:
    """Write the Grafana dashboards into the folder OUT, e.g. deploy/grafana."""
    from monitoring.dashboards import write_dashboards

    for path in write_dashboards(out):
        click.echo(str(path))


COMMANDS = (prometheus, alertmanager, dashboards)
