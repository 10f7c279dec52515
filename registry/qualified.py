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

    Args:
        var: where the host's cache lies. It is not signed, so it may choose only among what passed.
        contract: of the package.
        qualification: body of its signed statement; {} where there is none.
        asked: FORMULARY_ENGINE, e.g. openvino/bf16.
        kind: of the device, cpu or cuda.

    Raises:
        TrustError: what is asked for failed the qualification.
    """
    engines = qualification.get("engines", {})
    if asked and engines.get(asked, {}).get("passed") is False:
        raise TrustError(
            f"{asked} failed the qualification of {contract.task}: {engines[asked].get('reason', 'parity')}.",
            "Choose another FORMULARY_ENGINE, or none.",
        )
    best = read_host(var, qualification.get("package", "")).get("best", "")
    passed = engines.get(best, {}).get("passed") is True and best in contract.tolerance
    return asked or (best if passed and device_kind(best) == kind else DEFAULTS[kind])
