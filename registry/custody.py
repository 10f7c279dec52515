"""Evidence that leaves the house and is verified elsewhere; backups of ledger and packages."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imaging.config import Places
from imaging.errors import DataError, TrustError
from imaging.manifest import digest_file
from imaging.vocabulary import Decision
from registry.access import Acting
from registry.audit import KEYS, read_head
from registry.events import Event, authenticate, canonical
from registry.evidence import CITING, find_statement, verify_package
from registry.ledger import HEAD, Ledger
from registry.package import digest_package, shelf
from registry.proof import AGAIN, concerns, judge
from registry.signing import Signer, name_key

EVENTS = "events.jsonl"
MOST_BYTES = 8 * 2**30  # of a file that is read back


def export(acting: Acting, task: str, version: int, target: Path) -> Path:
    """Write package, statements and the decisions about a version into one file; the ledger records it.

    Args:
        acting: who, and why.
        task: the task.
        version: its number.
        target: the file to make, a .tar.

    Raises:
        DataError: the file exists.
        TrustError: the version does not hold.
    """
    ledger = acting.ledger
    digest, _ = ledger.version(task, version)
    package = shelf(acting.places.var, digest)
    evidence = verify_package(package, ledger)
    told = [e for e in ledger.events() if e.kind in KEYS or concerns(e, (task, version, digest))]
    if target.exists():
        raise DataError(f"{target} exists.", "Name another file.")
    with ledger.writing() as writer, tarfile.open(target, "x") as archive:
        archive.add(package, "package")
        for kind, cited in evidence.cited.items():
            archive.add(find_statement(package, kind, cited), f"package.statements/{kind}.json")
        _add(archive, EVENTS, told)
        body = {"version": version, "digest": digest, "what": target.name, "because": acting.because}
        writer.append(Decision.EXPORTED, task, body, acting.signer)
    return target


def verify_export(file: Path, public_keys: list[str]) -> dict[str, Any]:
    """Check an exported version with public keys alone: no ledger, no network, no private key.

    The newest record about the package that one of these keys signed says which statements belong to it. That
    later records were left out shows in the ledger alone.

    Args:
        file: as `export` writes it.
        public_keys: PEM, of the people whose word is taken.

    Returns:
        digest; statements: kind -> who signed; decisions: of those keys, as (kind, who, at). Who is the name
        that one of these keys vouches for, else the key's id.

    Raises:
        DataError: not such a file.
        TrustError: a file was changed, added or left out; a statement is unsigned, by another key or one that
            was revoked; a record was changed, or speaks of another version.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _unpack(file, folder)
        events = _read_events(folder / EVENTS)
        try:
            return judge(folder / "package", events, {name_key(pem): pem for pem in public_keys})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TrustError(f"{file.name} holds a record that is not of its kind.", AGAIN) from error


def back_up(acting: Acting) -> Path:
    """Write every event and every package into var/backups; private keys stay where they are.

    The ledger records it first, so that the backup holds that record.

    Raises:
        TrustError: the ledger does not hold: what is broken is no backup.
    """
    acting.ledger.verify()
    folder = acting.places.var / "backups"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_stamp()}.tar"
    body = {"what": f"backup {path.name}", "because": acting.because}
    with acting.ledger.writing() as writer:
        writer.append(Decision.EXPORTED, "", body, acting.signer)
    write_backup(path, acting.ledger.events(), sorted((acting.places.var / "packages").glob("*")))
    return path


def write_backup(path: Path, events: list[Event], packages: Iterable[Path]) -> None:
    """Write what `restore` takes: events, and folders of var/packages (packages, and their statements')."""
    with tarfile.open(draft := path.with_suffix(".draft"), "w") as archive:
        _add(archive, EVENTS, events)
        for package in packages:
            archive.add(package, f"packages/{package.name}")
    draft.rename(path)


def restore(
    places: Places, ledger: Ledger, path: Path, signer: Signer | None = None, accept_loss: str = ""
) -> dict[str, int]:
    """Put back what a backup has and this place lacks: the events after the ledger's last, and packages.

    Args:
        places: whose var is filled.
        ledger: its ledger.
        path: the backup.
        signer: who restores, for the record; None where the ledger is empty and trusts nobody yet.
        accept_loss: why the records may stay lost that the exported head knows and neither ledger nor backup
            has; that head is moved aside, and an incident names it.

    Returns:
        How many events and how many packages were put back.

    Raises:
        DataError: no such backup.
        TrustError: the backup does not hold; or the ledger has other events than the backup, which nothing
            here overwrites; or records would be lost, which nobody has accepted.
    """
    with tempfile.TemporaryDirectory(dir=places.var) as folder:
        _unpack(path, Path(folder))
        events = _read_events(Path(folder) / EVENTS)
        authenticate(events)
        with ledger.writing() as writer:
            new = _find_new(writer.events(), events, path.name)
            lost = _find_loss(places.var / HEAD, [*writer.events(), *new], accept_loss)
            for event in new:
                writer.insert(event)
            if lost:
                fact = f"Record {lost[0]} and those before it that {path.name} lacks are lost."
                body = {"fact": fact, "seq": lost[0], "hash": lost[1], "because": accept_loss}
                writer.append(Decision.INCIDENT, "", body, signer or "restore")
                (places.var / HEAD).rename(places.var / f"{HEAD}.lost-{_stamp()}")
            if signer:
                body = {"what": f"restored {path.name}", "because": accept_loss}
                writer.append(Decision.EXPORTED, "", body, signer)
        cited = _list_cited(ledger.signed())
        folders = sorted(Path(folder).glob("packages/*"))
        packages = [one for one in folders if _put_back(places.var, one, cited)]
    return {"events": len(new), "packages": len(packages)}


def _find_new(present: list[Event], events: list[Event], name: str) -> list[Event]:
    both = min(len(present), len(events))
    if present[:both] != events[:both]:
        raise TrustError(
            f"The ledger has other records than {name}.",
            "Move var/formulary.db aside (or name an empty database) and restore into a new one.",
        )
    return events[both:]


def _find_loss(head: Path, events: list[Event], accepted: str) -> tuple[int, str] | None:
    """Seq and hash of the exported head, where these events lack its record; refused unless accepted."""
    seq, digest = read_head(head)
    if not seq or (seq <= len(events) and events[seq - 1].hash == digest):
        return None
    if not accepted:
        last = f"record {len(events)}, of {events[-1].at}" if events else "nothing"
        raise TrustError(
            f"{head.name} knows record {seq} ({digest[:12]}), which neither the ledger nor the backup has; "
            f"they end with {last}: what was decided since would be lost. Nothing was put back.",
            "Restore a newer backup; or accept it: "
            'formulary registry restore FILE --accept-loss "because ...".',
        )
    return seq, digest


def _list_cited(events: list[Event]) -> set[str]:
    """Digests of the statements that the newest record about each package cites."""
    newest = {event.body["digest"]: event.body["evidence"] for event in events if event.kind in CITING}
    return {digest for evidence in newest.values() for digest in evidence.values()}


def _put_back(var: Path, one: Path, cited: set[str]) -> bool:
    """A package where none lies or it is not what its name says; of statements, each that is missing.

    A statement takes another one's place where it is cited, or named by its digest; what is in its way is
    kept beside it.
    """
    target = var / "packages" / one.name
    if one.suffix == ".statements":
        files = [path for path in sorted(one.rglob("*")) if path.is_file()]
        return bool([path for path in files if _put_statement(path, target / path.relative_to(one), cited)])
    if target.exists() and _is_whole(target):
        return False
    _clear(target)
    shutil.copytree(one, target)
    return True


def _put_statement(source: Path, target: Path, cited: set[str]) -> bool:
    digest = digest_file(source)
    wanted = f"sha256:{digest}" in cited or digest == source.stem
    if target.exists() and (not wanted or digest_file(target) == digest):
        return False
    _clear(target)
    shutil.copy2(source, target)
    return True


def _clear(target: Path) -> None:
    """Make room, and keep what was there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(target.with_name(f"{target.name}.damaged-{_stamp()}"))


def _stamp() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"


def _is_whole(package: Path) -> bool:
    try:
        return digest_package(package) == f"sha256:{package.name}"
    except TrustError:
        return False


def _add(archive: tarfile.TarFile, name: str, events: list[Event]) -> None:
    content = "".join(f"{canonical(vars(event))}\n" for event in events).encode()
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _unpack(file: Path, folder: Path) -> None:
    """Unpack plain files within bounds; links, devices and paths that lead out are refused."""
    try:
        with tarfile.open(file, "r:") as archive:
            members = archive.getmembers()
            if sum(member.size for member in members) > MOST_BYTES:
                raise DataError(
                    f"{file.name} holds more than {MOST_BYTES // 2**30} GiB.", "Nothing was unpacked."
                )
            for member in members:
                _unpack_one(archive, member, folder.resolve())
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{file} cannot be read: {type(error).__name__}.", "Name an exported file."
        ) from error


def _unpack_one(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """By hand: `extractall(filter="data")` came with Python 3.11.4."""
    target = (folder / member.name).resolve()
    if not target.is_relative_to(folder) or not (member.isfile() or member.isdir()):
        raise DataError(f"{member.name[:100]!r} is no plain file of an export.", "Nothing was taken from it.")
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    content = archive.extractfile(member)
    if content is not None:
        with target.open("xb") as stream:
            shutil.copyfileobj(content, stream)


def _read_events(path: Path) -> list[Event]:
    try:
        return [Event(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path.name} is not a list of ledger records.", "Name an exported file.") from error
