"""A version that answers: its contract, and the runner of its engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from registry.engines import Engine, check_parity, open_engine
from registry.package import Contract, read_contract
from registry.profiles import SiteProfile
from registry.projection import Projection, read_projection
from registry.state import State
from services.runner import Runner


@dataclass(frozen=True)
class Served:
    """A version that answers.

    Attributes:
        version: its number.
        digest: of its package.
        contract: what it promises.
        engine: name of what runs it, e.g. openvino/f32.
        heat_withheld: why its heat maps are not shown; empty where they passed their audit.
        runner: takes prepared images, gives the answers of each.
        projection: of embeddings, for the journal; None of an old package.
        profile: what one site's answers follow instead of the contract.
    """

    version: int
    digest: str
    contract: Contract
    engine: str
    heat_withheld: str
    runner: Runner
    projection: Projection | None = None
    profile: SiteProfile | None = None

    def at(self, site: str, state: State) -> Served:
        """The version as it answers a site: the same runner, and the profile that is kept for it there."""
        profile = state.profiles.get(site, {}).get(self.digest)
        return self if profile == self.profile else replace(self, profile=profile)


def load_package(folder: Path, named: tuple[int, str], engine: str, evaluation: dict[str, Any]) -> Served:
    """Open a verified package: parity on the golden cases, then one batch of each size class as a warm-up.

    Args:
        folder: the package.
        named: the number and the digest of the version.
        engine: e.g. openvino/f32.
        evaluation: body of its evaluation statement; it says whether heat maps may be shown.

    Raises:
        ConfigError: no such engine.
        DeviceMissing: its device is not there.
        TrustError: it does not answer the golden cases as promised.
    """
    contract, lanes = read_contract(folder), int(os.environ.get("FORMULARY_LANES", "1"))
    opened = open_package(folder, named[1], engine, lanes)
    check_parity(opened, folder, contract)
    for size in (1, contract.max_batch):
        opened.run(np.zeros((size, *contract.shape), np.float32))
    runner = Runner(opened, contract, getattr(opened, "lanes", lanes))
    withheld, projection = read_withheld(evaluation), read_projection(folder)
    return Served(*named, contract, opened.name, withheld, runner, projection)


def read_withheld(evaluation: dict[str, Any]) -> str:
    """Why heat maps are not shown, by the evaluation statement; empty where they passed their audit."""
    audit = evaluation.get("explanation") or {"passed": False, "reasons": ["heat maps were not audited"]}
    return "" if audit["passed"] is True else "; ".join(audit["reasons"])


def open_package(folder: Path, digest: str, engine: str, lanes: int = 1) -> Engine:
    """The engine of a verified package, e.g. openvino/f32; with the profile gpu in the devices' processes."""
    if read_profile() == "gpu":
        from services.remote import open_remote

        return open_remote(digest, engine)
    name, _, precision = engine.partition("/")
    return open_engine(folder, name, precision, int(os.environ.get("OMP_NUM_THREADS", "1")), streams=lanes)


def read_profile() -> str:
    """cpu: engines in this process; gpu: in the processes that own the devices. FORMULARY_PROFILE."""
    return os.environ.get("FORMULARY_PROFILE", "cpu")
