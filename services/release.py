"""A release: a Bento that serves a task without a checkout, with its container and Kubernetes files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from imaging.config import Places
from imaging.errors import ConfigError, DataError, NotApproved, Refused
from imaging.vocabulary import Decision
from registry.access import Acting
from registry.custody import restore, write_backup
from registry.events import NETWORK
from registry.evidence import verify_package
from registry.ledger import open_ledger
from registry.package import shelf, statements_folder

CODE = Path(__file__).parents[1]
DEPARTMENTS = ("imaging", "registry", "monitoring", "services")
ARCHIVE = "release.tar"
# What the serving process imports, at once or when asked for; what these need is added from the lock.
SERVING = (
    "alembic", "bentoml", "click", "cryptography", "Jinja2", "nibabel", "numpy", "onnxruntime", "openvino",
    "orjson", "pillow", "prometheus_client", "psutil", "psycopg", "psycopg-binary", "pydantic", "pydicom",
    "pyjpegls", "PyJWT", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "PyYAML",
    "rich", "scipy", "SQLAlchemy", "starlette", "uvicorn",
)  # fmt: skip
FOR_GPU = ("torch",)


@dataclass(frozen=True)
class Release:
    """What is released.

    Attributes:
        task: the task.
        version: the one that it is named after.
        digest: of that version's package.
        packages: digests of every package that stands in a slot of the task, so that a rollback has its own.
        folder: where bento/, container/ and kubernetes/ are made.
        profile: cpu or gpu.
    """

    task: str
    version: int
    digest: str
    packages: tuple[str, ...]
    folder: Path
    profile: str

    @property
    def name(self) -> str:
        """E.g. lung-nodule-v3."""
        return f"{self.task}-v{self.version}"


def choose(acting: Acting, task: str, version: int | None, site: str | None) -> tuple[int, str, set[str]]:
    """The version to release, its digest, and the digests of all that stands in the task's slots.

    Args:
        acting: whose ledger says it.
        task: the task.
        version: a number that serves somewhere; None asks the site.
        site: whose champion; None is the network's.

    Raises:
        UnknownVersion: no such version.
        Refused: it serves nowhere.
        NotApproved: the site has no champion.
    """
    state = acting.ledger.state(task)
    slots = [placement for held in state.slots().values() for placement in held.values()]
    champions = state.champions()
    if version is not None:
        digest = acting.ledger.version(task, version)[0]
        if digest not in {champion.digest for champion in champions.values()}:
            raise Refused(f"{task} v{version} serves nowhere.", "Promote it, and have it approved, first.")
        return version, digest, {slot.digest for slot in slots}
    trail = state.trail.get(NETWORK, []) if site is None else [champions[site]] if site in champions else []
    if not trail:
        where = f"at {site}" if site else "anywhere"
        raise NotApproved(
            f"No version of {task} serves {where}.", "Promote one, and have it approved, first."
        )
    return trail[-1].version, trail[-1].digest, {slot.digest for slot in slots}


def build_release(acting: Acting, release: Release) -> Path:
    """Make the Bento and the files that run it; the ledger records that it left.

    Args:
        acting: who, and why.
        release: what.

    Returns:
        The folder, with bento/, container/ and kubernetes/.

    Raises:
        DataError: the folder is not empty, or BentoML could not build.
        TrustError: a package does not hold: nothing is made.
        ConfigError: requirements.lock lacks something that serving needs.
    """
    if release.folder.exists() and any(release.folder.iterdir()):
        raise DataError(f"{release.folder} is not empty.", "Name another folder with --out.")
    for digest in release.packages:
        verify_package(shelf(acting.places.var, digest), acting.ledger)
    body = {"version": release.version, "digest": release.digest, "what": f"release {release.name}",
            "because": acting.because}  # fmt: skip
    with acting.ledger.writing() as writer:
        writer.append(Decision.EXPORTED, release.task, body, acting.signer)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        write_source(acting, release, source)
        release.folder.mkdir(parents=True, exist_ok=True)
        shutil.move(_build_bento(release, source), bento := release.folder / "bento")
    bento.chmod(0o755)  # BentoML made it for one user alone, and a container has another
    _render(release)
    return release.folder


def write_source(acting: Acting, release: Release, source: Path) -> None:
    """What the Bento is made of: code, decisions, and one file that `restore` takes: ledger, packages."""
    places = acting.places
    skipped = shutil.ignore_patterns("__pycache__", "policies", "*.pyc")
    for department in DEPARTMENTS:
        shutil.copytree(CODE / department, source / department, ignore=skipped)
    shutil.copy(CODE / "formulary.py", source)
    policy = Path("registry", "policies", f"{release.task}.yaml")
    given = [
        path for path in (Path("sites.yaml"), Path("roles.yaml"), policy) if (places.root / path).exists()
    ]
    for path in [*given, *_list_issuers_keys(places)]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(places.root / path, source / path)
    params = yaml.safe_load((places.root / "params.yaml").read_text())
    params["tasks"] = {release.task: params["tasks"][release.task]}
    (source / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shelves = [shelf(places.var, digest) for digest in release.packages]
    folders = [*shelves, *(statements_folder(package) for package in shelves)]
    write_backup(source / ARCHIVE, acting.ledger.events(), folders)
    lock = (CODE / "requirements.lock").read_text().splitlines()
    pins = pin_requirements(lock, SERVING + FOR_GPU * (release.profile == "gpu"))
    (source / "requirements.txt").write_text("".join(f"{pin}\n" for pin in pins))
    (source / "bentofile.yaml").write_text(yaml.safe_dump(_describe_bento(release, source)))


def pin_requirements(lock: list[str], names: tuple[str, ...]) -> list[str]:
    """The lock's lines for some packages and all that they need on this kind of machine.

    Raises:
        ConfigError: the lock lacks one.
    """
    pins = {canonicalize_name(line.split("==")[0]): line for line in lock if "==" in line}
    wanted, found = [Requirement(name) for name in names], dict[str, str]()
    while wanted:
        asked = wanted.pop()
        name = canonicalize_name(asked.name)
        if name not in pins:
            raise ConfigError(f"requirements.lock has no {name}, which serving needs.", "Lock it again.")
        if name not in found:
            needed = [Requirement(line) for line in requires(asked.name) or []]
            needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
            wanted += [one for one in needed if not _is_left_out(name, one, pins)]
        found[name] = pins[name]
    return [found[name] for name in sorted(found)]


def _is_left_out(name: str, needed: Requirement, pins: Mapping[NormalizedName, str]) -> bool:
    """What a lock does not list: setuptools, and what a CUDA build of torch brings by pins of its own."""
    return canonicalize_name(needed.name) not in pins and (name == "torch" or needed.name == "setuptools")


def unpack_release(places: Places) -> None:
    """Where this is a release, put its ledger and packages into var; the signatures of both are checked.

    Raises:
        TrustError: they do not hold, or var has another ledger.
    """
    archive = places.root / ARCHIVE
    if archive.exists():
        places.var.mkdir(parents=True, exist_ok=True)
        restore(places, open_ledger(places.var), archive)


def _list_issuers_keys(places: Places) -> list[Path]:
    """JWKS files (public keys) that roles.yaml names inside the checkout."""
    from registry.access import read_roles

    roles = read_roles(places)
    return [issuer.keys for issuer in roles.issuers if not issuer.keys.is_absolute()] if roles else []


def _describe_bento(release: Release, source: Path) -> dict[str, Any]:
    """bentofile.yaml; the patterns are anchored, else every file of such a name at any depth is packed."""
    return {
        "service": "services.gateway:Gateway",
        "name": release.task,
        "description": f"{release.name}, {release.digest}. Research use only.\n",
        "labels": {"task": release.task, "version": str(release.version),
                   "digest": release.digest.replace(":", "-"), "profile": release.profile},
        "include": sorted(f"/{path.name}" + "/" * path.is_dir() for path in source.iterdir()),
        "exclude": ["__pycache__/"],
        "python": {"requirements_txt": "requirements.txt", "lock_packages": False},
    }  # fmt: skip


def _build_bento(release: Release, source: Path) -> Path:
    """`bentoml build` in a process and a store of its own; the Bento's folder."""
    store = source.with_name("store")
    environment = {
        **os.environ, "BENTOML_HOME": str(store), "BENTOML_DO_NOT_TRACK": "true", "PYTHONPATH": str(source),
        "FORMULARY_ROOT": str(source), "FORMULARY_VAR": str(source.with_name("var")),
        "FORMULARY_PROFILE": "cpu",
    }  # fmt: skip
    version = f"v{release.version}-{release.digest[7:19]}"
    command = [sys.executable, "-m", "bentoml", "build", str(source), "--version", version]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    built = store / "bentos" / release.task / version
    if done.returncode or not built.exists():
        last = re.sub(r"\s+", " ", (done.stdout + done.stderr)[-400:])
        raise DataError(f"BentoML could not build {release.name}: {last}", "Mend it, and run this again.")
    return built


def _render(release: Release) -> None:
    """deploy/container and deploy/kubernetes with this release's names."""
    import jinja2

    gpu = release.profile == "gpu"
    told = {"task": release.task, "version": release.version, "digest": release.digest, "gpu": gpu,
            "name": release.name, "image": f"formulary/{release.task}:v{release.version}",
            "python": f"{sys.version_info.major}.{sys.version_info.minor}"}  # fmt: skip
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    for template in sorted((CODE / "deploy").glob("[ck]*/*")):
        target = release.folder / template.parent.name / template.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(environment.from_string(template.read_text()).render(told))
