"""The signed statements about one package, what the package statement says, and whether they hold."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from imaging.config import Places, read_params
from imaging.errors import TrustError
from imaging.manifest import digest_file
from imaging.vocabulary import Statement
from registry.events import TrustedKey
from registry.ledger import Ledger
from registry.package import combine_digests, digest_files, statements_folder
from registry.signing import Signer, seal, state, unseal


@dataclass(frozen=True)
class Evidence:
    """What is known of a package, every part of it signed.

    Attributes:
        digest: of the package, sha256:...
        statements: kind -> its body (in-toto's predicate).
        signed_by: kind -> identity of the signer.
    """

    digest: str
    statements: dict[str, dict[str, Any]]
    signed_by: dict[str, str]

    def body(self, kind: Statement) -> dict[str, Any]:
        """The body of a statement.

        Raises:
            TrustError: there is no such statement.
        """
        if kind not in self.statements:
            raise TrustError(
                f"The package {self.digest[:19]} has no {kind} statement.",
                "Run `formulary registry register` again.",
            )
        return self.statements[kind]


def sign_statements(package: Path, bodies: dict[Statement, dict[str, Any]], signer: Signer) -> None:
    """Sign what departments say of a package, into the folder beside it.

    Args:
        package: its folder on the shelf.
        bodies: kind -> body.
        signer: whose key signs.
    """
    files = digest_files(package)
    folder = statements_folder(package)
    folder.mkdir(exist_ok=True)
    for kind, body in bodies.items():
        envelope = seal(state(files, kind, body), signer)
        path, draft = folder / f"{kind}.json", folder / f"{kind}.json.draft"
        draft.write_text(json.dumps(envelope, indent=1) + "\n")
        if path.exists():  # nothing is overwritten: the ledger still names it by its digest
            (folder / "superseded").mkdir(exist_ok=True)
            path.rename(folder / "superseded" / f"{digest_file(path)}.json")
        draft.rename(path)


def digest_statements(package: Path) -> dict[str, str]:
    """What an event cites: kind -> sha256:... of each statement's file."""
    paths = sorted(statements_folder(package).glob("*.json"))
    return {path.stem: f"sha256:{digest_file(path)}" for path in paths}


def read_evidence(package: Path, trusted: dict[str, TrustedKey]) -> Evidence:
    """Open a package's statements, each checked against a trusted key and the files as they are now.

    Raises:
        TrustError: a file was changed, added or removed; a statement is about something else, unsigned, or
            signed by a key that is not trusted.
    """
    files = digest_files(package)
    keys = {key.key: key.public for key in trusted.values()}
    statements: dict[str, dict[str, Any]] = {}
    signed_by: dict[str, str] = {}
    for path in sorted(statements_folder(package).glob("*.json")):
        statement, key = unseal(_read_envelope(path), keys)
        told = {item["name"]: item["digest"]["sha256"] for item in statement["subject"]}
        if told != files:
            changed = sorted(name for name in files | told if files.get(name) != told.get(name))
            raise TrustError(
                f"The package {package.name[:12]} is not what was signed: {', '.join(changed)} changed.",
                "Restore var/packages from a backup, or register the version again.",
            )
        if statement["predicateType"] != f"formulary/{path.stem}/v1":
            raise TrustError(
                f"{path.name} is a {statement['predicateType']} statement.", "Register the version again."
            )
        statements[path.stem], signed_by[path.stem] = statement["predicate"], trusted[key].identity
    return Evidence(combine_digests(files), statements, signed_by)


def verify_package(package: Path, ledger: Ledger) -> Evidence:
    """Refuse a package whose signature does not hold or which the ledger never registered.

    Raises:
        TrustError: as `read_evidence`; or no `package` statement; or a digest that is not in the ledger.
    """
    evidence = read_evidence(package, ledger.trusted_keys())
    evidence.body(Statement.PACKAGE)
    if evidence.digest not in {digest for _, _, digest, _ in ledger.versions()}:
        raise TrustError(f"The package {evidence.digest[:19]} is not in the ledger.", "Register it first.")
    return evidence


def _read_envelope(path: Path) -> dict[str, Any]:
    try:
        envelope = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrustError(f"{path.name} cannot be read.", "Register the version again.") from error
    if not isinstance(envelope, dict):
        raise TrustError(f"{path.name} is not an envelope.", "Register the version again.")
    return envelope


def describe_provenance(places: Places, task: str) -> dict[str, Any]:
    """The body of a package statement.

    Returns:
        commit ("unknown" outside git) and whether the tree differed from it; what dvc.lock says of the task's
        stages (md5 of every dependency and output); parameters; sha256 of the requirements and dvc.lock;
        Python and machine; the training history.
    """
    commit = _git(places.root, "rev-parse", "HEAD")
    changed = _git(places.root, "status", "--porcelain", "--untracked-files=no", "--", ":!dvc.lock")
    return {
        "task": task,
        "commit": commit or "unknown",
        "modified": bool(changed),
        "stages": _read_stages(places.root / "dvc.lock", task),
        "dvc_lock": _digest(places.root / "dvc.lock"),
        "environment": {"requirements": _digest(places.root / "requirements.lock"),
                        "python": platform.python_version(),
                        "machine": platform.machine()},
        "params": read_params(places).task(task).model_dump(mode="json"),
        "history": json.loads((places.stage(task, "fit") / "history.json").read_text()),
    }  # fmt: skip


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _digest(path: Path) -> str:
    return "sha256:" + digest_file(path) if path.exists() else "absent"


def _read_stages(lock: Path, task: str) -> dict[str, dict[str, str]]:
    """Stage -> path -> md5, of the stages of a task as DVC ran them."""
    if not lock.exists():
        return {}
    stages = yaml.safe_load(lock.read_text())["stages"]
    return {
        name: {
            item["path"]: item["md5"]
            for part in ("deps", "outs")
            for item in entry.get(part, [])
            if "md5" in item
        }
        for name, entry in stages.items()
        if name.endswith(f"@{task}")
    }
