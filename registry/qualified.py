"""Which engine serves a package on this host, among those that its signed qualification vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imaging.errors import TrustError
from registry.engines import device_kind
from registry.package import Contract, shelf

DEFAULTS = {"cpu": "openvino/f32", "cuda": "torch-cuda/f16"}


def host_file(var: Path, digest: str) -> Path:
    """Where this host keeps how fast it runs a package: one file a package, so that none forgets another."""
    return var / "host" / f"{shelf(var, digest).name}.json"


def write_host(var: Path, measured: dict[str, Any]) -> None:
    """Keep what this host measured of a package: package, best and ms_per_batch."""
    path = host_file(var, measured["package"])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(measured, indent=1) + "\n")
    draft.replace(path)


def read_host(var: Path, digest: str) -> dict[str, Any]:
    """What this host measured of a package; {} where it did not look."""
    path = host_file(var, digest)
    measured: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return measured


def choose_engine(
    var: Path, contract: Contract, qualification: dict[str, Any], asked: str = "", kind: str = "cpu"
) -> str:
    """What serves a package here: what is asked for; else what this host found fastest; else the default.

    Where the default failed the qualification, the first that passed and is promised for such a device.

    Args:
        var: where the host's cache lies. It is not signed, so it may choose only among what passed.
        contract: of the package.
        qualification: body of its signed statement; {} where there is none.
        asked: FORMULARY_ENGINE, e.g. openvino/bf16.
        kind: of the device, cpu or cuda.

    Raises:
        TrustError: what is asked for failed the qualification, or all that the contract promises here.
    """
    engines = qualification.get("engines", {})
    best = read_host(var, qualification.get("package", "")).get("best", "")
    passed: list[str] = [name for name, told in engines.items() if told.get("passed") is True]
    fit = [name for name in passed if name in contract.tolerance and device_kind(name) == kind]
    chosen = asked or (best if best in fit else DEFAULTS[kind])
    if engines.get(chosen, {}).get("passed") is not False:
        return chosen
    if fit and not asked:
        return fit[0]
    raise TrustError(
        f"{chosen} failed the qualification of {contract.task}: {engines[chosen].get('reason', 'parity')}.",
        "Choose another FORMULARY_ENGINE, or none."
        if fit
        else f"No engine for {kind} passed: qualify it again.",
    )
