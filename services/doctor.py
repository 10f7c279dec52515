"""Whether this installation can do its work, and what to mend."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version

from imaging.config import Places, read_params, read_sites
from imaging.errors import FormularyError
from monitoring.journal import open_journal
from registry.ledger import open_ledger
from registry.policy import read_policy
from services.keys import PREFIX, keys_path, read_keys
from services.stack import PORTS, is_free

SOON = timedelta(days=14)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `mend` says what to do when it is not well."""

    name: str
    well: bool
    told: str
    mend: str = ""


def examine(places: Places) -> list[Check]:
    """Look at everything; what goes wrong in a look is a finding, not an end."""
    looks: list[Callable[[Places], Check]] = [
        _python, _packages, _devices, _threads, _ports, _disk, _decisions, _ledger, _journal, _keys, _access,
    ]  # fmt: skip
    found = []
    for look in looks:
        try:
            found.append(look(places))
        except FormularyError as error:
            found.append(Check(look.__name__.strip("_"), False, error.fact, error.fix))
    return found


def _python(_: Places) -> Check:
    told = ".".join(str(part) for part in sys.version_info[:3])
    return Check("python", sys.version_info >= (3, 11), told, "Install Python 3.11 or newer.")


def _packages(places: Places) -> Check:
    lines = (places.root / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    wrong = [
        f"{name} {_installed(name)} instead of {pin}" for name, pin in pins.items() if _installed(name) != pin
    ]
    told = f"{len(pins)} as pinned" if not wrong else "; ".join(wrong[:5])
    return Check("packages", not wrong, told, "pip install -r requirements.lock")


def _installed(name: str) -> str:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return "nothing"


def _devices(_: Places) -> Check:
    from registry.engines import import_openvino

    names = import_openvino().Core().available_devices
    return Check("devices", "CPU" in names, ", ".join(names), "OpenVINO needs a CPU with AVX2.")


def _threads(places: Places) -> Check:
    cores = os.cpu_count() or 1
    asked = {name: task.fit.threads for name, task in read_params(places).tasks.items()}
    told = f"{cores} cores; fit asks for {', '.join(f'{count} ({name})' for name, count in asked.items())}"
    return Check(
        "threads", max(asked.values(), default=1) <= cores, told, "Lower fit.threads in params.yaml."
    )


def _ports(_: Places) -> Check:
    taken = [str(port) for port in PORTS.values() if not is_free(port)]
    told = "free" if not taken else f"in use: {', '.join(taken)}"
    return Check("ports", not taken, told, f"Stop what listens there, or set {', '.join(PORTS)}.")


def _disk(places: Places) -> Check:
    places.var.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(places.var).free / 2**30
    writable = os.access(places.var, os.W_OK)
    return Check(
        "disk",
        free > 2 and writable,
        f"{free:.0f} GiB free at {places.var}",
        "Free 2 GiB, or move FORMULARY_VAR.",
    )


def _decisions(places: Places) -> Check:
    params, sites = read_params(places), read_sites(places)
    for task in params.tasks:
        read_policy(task)
    return Check("decisions", True, f"{len(params.tasks)} tasks with policies, {len(sites.sites)} sites")


def _ledger(places: Places) -> Check:
    return Check("ledger", True, f"{open_ledger(places.var).verify()} events, chain and signatures hold")


def _journal(places: Places) -> Check:
    return Check("journal", True, f"{open_journal(places.var).last_seq()} predictions")


def _keys(places: Places) -> Check:
    keys = sorted((places.var / "keys").glob("*.pem"))
    open_to_all = [key.name for key in keys if key.stat().st_mode & 0o077]
    if open_to_all:
        return Check(
            "keys", False, f"readable by others: {', '.join(open_to_all)}", "chmod 600 var/keys/*.pem"
        )
    told = f"{len(keys)} private keys, readable by their owner alone"
    return Check("keys", bool(keys), told, "formulary registry keys create")


def _access(places: Places) -> Check:
    """API keys: off is well on loopback, where `serve` alone listens without them."""
    keys, path = read_keys(places.var), keys_path(places.var)
    if not keys:
        return Check("access", True, "off: no API key was made; the gateway answers on loopback alone")
    if path.stat().st_mode & 0o077:
        return Check("access", False, f"{path} is readable by others", f"chmod 600 {path}")
    now = [key for key in keys if key.holds]
    soon = [key for key in now if not key.replaced_by and key.expires < datetime.now(UTC) + SOON]
    if soon:
        told = ", ".join(f"{PREFIX}{key.id} ({key.site or 'no site'})" for key in soon)
        return Check(
            "access", False, f"within {SOON.days} days ends: {told}", "formulary services keys rotate KEY"
        )
    return Check(
        "access", bool(now), f"{len(now)} of {len(keys)} API keys hold", "formulary services keys create"
    )
