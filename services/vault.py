"""Where kept pixels lie: a file an image, encrypted with its site's key; a folder a day, erased on time."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from imaging.config import Places, read_sites
from imaging.errors import TrustError
from registry.signing import read_secret

LOG = logging.getLogger(__name__)
NONCE = 12
NUMBER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Held:
    """A body as it was sent.

    Attributes:
        site: whose it is.
        kind: its content type.
        body: its bytes.
    """

    site: str
    kind: str
    body: bytes


def read_days(places: Places) -> dict[str, int]:
    """Site -> for how many days it keeps pixels; those that keep none are left out."""
    return {name: site.keep_days for name, site in read_sites(places).sites.items() if site.keep_days}


def seal(var: Path, held: Held, number: str) -> bytes:
    """Encrypt a body: AES-256-GCM with the prediction's id as associated data, behind a random nonce.

    The site's key is made where there is none.
    """
    nonce, key = secrets.token_bytes(NONCE), AESGCM(read_secret(_key_path(var, held.site)))
    return nonce + key.encrypt(nonce, held.kind.encode() + b"\n" + held.body, number.encode())


def write(root: Path, site: str, number: str, sealed: bytes) -> None:
    """Draft and rename. Without fsync, for which the journal would wait: what is torn does not decrypt."""
    folder = root / site / _today().isoformat()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = folder / f".{number}"
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(sealed)
    draft.rename(folder / number)


def find_pixels(places: Places, site: str, number: str) -> Held | None:
    """What was sent for a prediction; None where it is not kept, or is not any more.

    Args:
        places: keys and var/pixels.
        site: of the prediction.
        number: its id; what is no uuid is not found.

    Raises:
        TrustError: the file was changed, or the key with which it was written is gone.
    """
    path, key = find_file(places.var, site, number), _key_path(places.var, site)
    if path is None:
        return None
    if not key.exists():
        raise TrustError(f"The key of {site}'s pixels is gone.", "They cannot be read again.")
    sealed = path.read_bytes()
    try:
        told = AESGCM(key.read_bytes()).decrypt(sealed[:NONCE], sealed[NONCE:], number.encode())
    except (InvalidTag, ValueError) as error:
        fact = f"The pixels kept on {path.parent.name} do not decrypt with {site}'s key."
        raise TrustError(fact, "The file was changed, or the key was removed since.") from error
    kind, _, body = told.partition(b"\n")
    return Held(site, kind.decode(), body)


def find_file(var: Path, site: str, number: str) -> Path | None:
    """Where the pixels of a prediction lie; None where none are kept, or the id is no uuid."""
    if not NUMBER.fullmatch(number):
        return None
    paths = (folder / number for _, folder in _folders(var / "pixels" / site))
    return next((path for path in paths if path.exists()), None)


def forget(places: Places, site: str) -> int:
    """Remove a site's key, so that copies of its pixels elsewhere cannot be read either, then the pixels.

    Returns:
        How many images were removed.

    Raises:
        UnknownSite: sites.yaml does not list it, and nothing of it is kept.
    """
    root = places.var / "pixels"
    if site not in (path.name for path in (root.iterdir() if root.is_dir() else ())):
        read_sites(places).site(site)
    _key_path(places.var, site).unlink(missing_ok=True)
    count = sum(len(list(day.iterdir())) for _, day in _folders(root / site))
    if (root / site).is_dir():
        shutil.rmtree(root / site)
    return count


def erase(root: Path, days: dict[str, int]) -> None:
    """Remove the folders of days that are more days ago than their site keeps, all of a site that keeps none.

    Args:
        root: var/pixels.
        days: site -> for how many days it keeps pixels.
    """
    for site in sorted(root.iterdir()) if root.is_dir() else ():
        for day, folder in _folders(site):
            if site.name not in days or (_today() - day).days > days[site.name]:
                _remove(folder, "it is over its time")


def make_room(root: Path, most: int) -> int:
    """Remove the oldest days before today until what is kept fits.

    Args:
        root: var/pixels.
        most: bytes.

    Returns:
        Bytes that are kept now.
    """
    sites = sorted(root.iterdir()) if root.is_dir() else []
    found = [(day, folder, _measure(folder)) for site in sites for day, folder in _folders(site)]
    total = sum(size for _, _, size in found)
    for day, folder, size in sorted(found, key=lambda one: one[0]):
        if total <= most or day >= _today():
            break
        _remove(folder, f"{total} bytes are kept and FORMULARY_PIXELS_BYTES allows {most}")
        total -= size
    if total > most:
        LOG.warning("pixels are not kept any more today: the day fills FORMULARY_PIXELS_BYTES (%d)", most)
    return total


def _remove(folder: Path, why: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # another worker may be at it
    if folder.exists():
        LOG.error("pixels of %s, %s could not be removed", folder.parent.name, folder.name)
    else:
        LOG.warning("pixels of %s, %s were removed: %s", folder.parent.name, folder.name, why)


def _folders(site: Path) -> Iterator[tuple[date, Path]]:
    """The days of a site, oldest first."""
    for folder in sorted(site.iterdir()) if site.is_dir() else ():
        with contextlib.suppress(ValueError):
            yield date.fromisoformat(folder.name), folder


def _measure(folder: Path) -> int:
    size = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                size += entry.stat().st_size
    return size


def _today() -> date:
    return datetime.now(UTC).date()


def _key_path(var: Path, site: str) -> Path:
    return var / "keys" / f"pixels-{site}.key"
