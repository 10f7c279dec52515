"""The signed statements about one package, what the package statement says, and whether they hold."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from imaging.config import Places, read_params
from imaging.errors import TrustError
from imaging.manifest import digest_file
from imaging.vocabulary import Decision, Statement
from registry.changes import describe_population
from registry.events import Event, TrustedKey, read_key
from registry.imports import list_params
from registry.ledger import Ledger
from registry.package import combine_digests, digest_files, read_contract, statements_folder
from registry.signing import Signer, seal, state, unseal

CITING = (Decision.REGISTERED, Decision.RENEWED)


@dataclass(frozen=True)
class Evidence:
    """What is known of a package, every part of it signed.

    Attributes:
        digest: of the package, sha256:...
        statements: kind -> its body (in-toto's predicate).
        signed_by: kind -> identity of the signer.
        cited: kind -> sha256:... of the statement's file, as ledger events cite it.
        keys: kind -> id of the key that signed.
    """

    digest: str
    statements: dict[str, dict[str, Any]]
    signed_by: dict[str, str]
    cited: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

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


def find_cited(events: list[Event], digest: str) -> Event | None:
    """The newest record that says which statements a package's evidence is; None where there is none."""
    known = [event for event in events if event.kind in CITING and event.body["digest"] == digest]
    return known[-1] if known else None


def read_evidence(
    package: Path, trusted: dict[str, TrustedKey], cited: dict[str, str] | None = None
) -> Evidence:
    """Open a package's statements, each checked against a trusted key and the files as they are now.

    Args:
        package: its folder; the statements lie beside it.
        trusted: key id -> key.
        cited: kind -> sha256:... of the statements to open, older ones too; None opens what lies there.

    Raises:
        TrustError: a file was changed, added or removed; a statement is missing, about something else,
            unsigned, or signed by a key that is not trusted.
    """
    files = digest_files(package)
    cited = digest_statements(package) if cited is None else cited
    found = Evidence(combine_digests(files), {}, {}, cited)
    for kind, digest in cited.items():
        statement, key = unseal(
            _read_envelope(find_statement(package, kind, digest)),
            {key.key: key.public for key in trusted.values()},
        )
        _hold_to_files(package, files, statement)
        if statement["predicateType"] != f"formulary/{kind}/v1":
            raise TrustError(
                f"{kind}.json is a {statement['predicateType']} statement.", "Register the version again."
            )
        found.statements[kind] = statement["predicate"]
        found.signed_by[kind], found.keys[kind] = trusted[key].identity, key
    return found


def find_statement(package: Path, kind: str, digest: str) -> Path:
    """The file of a statement: the newest of its kind, or one that a newer, uncited one has superseded."""
    folder = statements_folder(package)
    for path in (folder / f"{kind}.json", folder / "superseded" / f"{digest.removeprefix('sha256:')}.json"):
        if path.exists() and f"sha256:{digest_file(path)}" == digest:
            return path
    raise TrustError(
        f"The {kind} statement of {package.name[:12]} that the ledger cites is not there.",
        "Restore var/packages from a backup, or register the version again.",
    )


def _hold_to_files(package: Path, files: dict[str, str], statement: dict[str, Any]) -> None:
    told = {item["name"]: item["digest"]["sha256"] for item in statement["subject"]}
    if told != files:
        changed = sorted(name for name in files | told if files.get(name) != told.get(name))
        raise TrustError(
            f"The package {package.name[:12]} is not what was signed: {', '.join(changed)} changed.",
            "Restore var/packages from a backup, or register the version again.",
        )


def verify_package(package: Path, ledger: Ledger) -> Evidence:
    """Refuse a package whose signature does not hold or which the ledger does not know as it is.

    The evidence is what the newest ledger record about the package cites, so that an older signed statement
    cannot take its place. What a revoked key signed holds where that record is older than the revocation.

    Raises:
        TrustError: as `read_evidence`; or no `package` statement; or a digest that is not in the ledger.
    """
    events, digest = ledger.signed(), f"sha256:{package.name}"
    record = find_cited(events, digest)
    if record is None:
        raise TrustError(f"The package {digest[:19]} is not in the ledger.", "Register it first.")
    evidence = read_evidence(package, _keys_ever(events), record.body["evidence"])
    evidence.body(Statement.PACKAGE)
    revoked = {event.body["key"]: event.seq for event in events if event.kind == Decision.KEY_REVOKED}
    late = [kind for kind, key in evidence.keys.items() if revoked.get(key, record.seq) < record.seq]
    if late:
        raise TrustError(
            f"The {', '.join(late)} statement was signed by a key that had been revoked.",
            "Register the version again.",
        )
    return evidence


def _keys_ever(events: list[Event]) -> dict[str, TrustedKey]:
    """Every key that the ledger ever trusted, revoked ones too."""
    keys: dict[str, TrustedKey] = {}
    for event in events:
        if event.kind == Decision.KEY_TRUSTED:
            keys |= read_key(event)
    return keys


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
    lineage = read_contract(places.stage(task, "package")).lineage
    stages = _read_stages(places.root / "dvc.lock", task)
    history: dict[str, Any]
    if "imported" in lineage:  # DVC's later stages made another model
        history = {"history": {"epochs": []}}
        stages = {
            name: told
            for name, told in stages.items()
            if name.partition("@")[0] in ("cohort", "split", "check")
        }
    else:
        history = {"history": json.loads((places.stage(task, "fit") / "history.json").read_text())}
    changed = _git(places.root, "status", "--porcelain", "--untracked-files=no", "--", ":!dvc.lock")
    return {
        "task": task,
        "commit": commit or "unknown",
        "modified": bool(changed),
        "stages": stages,
        "lineage": lineage,
        "dvc_lock": _digest(places.root / "dvc.lock"),
        "environment": {"requirements": _digest(places.root / "requirements.lock"),
                        "python": platform.python_version(),
                        "machine": platform.machine()},
        "population": describe_population(places.stage(task, "split") / "manifest.parquet"),
        "params": list_params(read_params(places).task(task), lineage),
        **history,
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


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
