"""Prometheus and Alertmanager on this machine: their configuration and the commands that start them.

They are programs of Debian (deploy/debian.sh) and nothing needs them: alarms stand in the ledger and on the
console in any case. They listen on loopback alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from imaging.config import Places
from imaging.errors import NotReady

PROGRAMS = {"prometheus": ("prometheus",), "alertmanager": ("prometheus-alertmanager", "alertmanager")}
KEPT = "90d"


def is_installed(name: str) -> bool:
    """Whether `prometheus` or `alertmanager` can be started here."""
    return any(shutil.which(program) for program in PROGRAMS[name])


def find_program(name: str) -> str:
    """Where a program is.

    Raises:
        NotReady: it is not installed.
    """
    for program in PROGRAMS[name]:
        if path := shutil.which(program):
            return path
    raise NotReady(f"{name} is not installed.", "deploy/debian.sh installs it, where there are root and apt.")


def write_prometheus(places: Places, gateway: int, alertmanager: int, interval_s: int = 15) -> Path:
    """Write deploy/prometheus/prometheus.yml to var/prometheus with the ports that are in use.

    Where var/keys/prometheus.key lies, Prometheus shows it to the gateway.

    Args:
        places: of the checkout; rules are read where they lie.
        gateway: port that is asked for metrics.
        alertmanager: port that is told.
        interval_s: seconds between questions, and between looks at the rules.

    Returns:
        The file.
    """
    folder, ports = (
        places.root / "deploy" / "prometheus",
        {"formulary": gateway, "alertmanager": alertmanager},
    )
    told: dict[str, Any] = yaml.safe_load((folder / "prometheus.yml").read_text())
    told["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{interval_s}s")
    told["global"]["scrape_timeout"] = f"{min(interval_s, 10)}s"
    told["rule_files"] = [str(folder / name) for name in told["rule_files"]]
    told["alerting"]["alertmanagers"] = [_name_target(alertmanager)]
    for job in told["scrape_configs"]:
        job["static_configs"] = _name_target(ports[job["job_name"]])["static_configs"]
    key = places.var.resolve() / "keys" / "prometheus.key"
    if key.exists():
        told["scrape_configs"][0]["authorization"] = {"credentials_file": str(key)}
    path = places.var.resolve() / "prometheus" / "prometheus.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(told, sort_keys=False))
    return path


def command_prometheus(places: Places, config: Path, port: int) -> list[str]:
    """The command line of Prometheus; its data lie in var/prometheus/data, for 90 days.

    Raises:
        NotReady: it is not installed.
    """
    data = places.var.resolve() / "prometheus" / "data"
    return [
        find_program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={data}",
        f"--storage.tsdb.retention.time={KEPT}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip


def command_alertmanager(places: Places, config: Path, port: int) -> list[str]:
    """The command line of Alertmanager; it finds no other one, and its data lie in var/alertmanager.

    Raises:
        NotReady: it is not installed.
    """
    data = places.var.resolve() / "alertmanager"
    data.mkdir(parents=True, exist_ok=True)
    return [
        find_program("alertmanager"), f"--config.file={config}", f"--storage.path={data}",
        f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=",
    ]  # fmt: skip


def _name_target(port: int) -> dict[str, Any]:
    return {"static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
