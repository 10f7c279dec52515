"""Room for jobs: how many may wait or arrive, how much they hold, and how much of the disk they leave.

A body that still arrives has a folder whose name claims its room, `ID,BYTES,SITE.draft`: what is promised
counts before it is here. Claims and jobs of all gateways are made one after the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from imaging.errors import Overloaded

WAITING = 64  # jobs that are not finished, and bodies that arrive
WAITING_PER_SITE = 16
KEPT = 1000
HELD_BYTES = 4 * 2**30  # of bodies and results
FREE_BYTES = 2 * 2**30  # of the disk are left to the journal, without which no answer leaves
RETRY_S = 30.0


class Asked(Protocol):
    """A job, of which only the site matters here."""

    site: str


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other thread and no other gateway takes room meanwhile."""
    with (folder / "room.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_draft(folder: Path, site: str, size_bytes: int, waiting: Callable[[], Sequence[Asked]]) -> Path:
    """A folder for a body that will arrive, which claims its room.

    Raises:
        Overloaded: there is none; nothing is left.
    """
    path = folder / f"{uuid.uuid4()},{size_bytes},{site}.draft"
    with alone(folder):
        path.mkdir(mode=0o700)
        try:
            check_room(folder, site, waiting())
        except Overloaded:
            path.rmdir()
            raise
    return path


def check_room(folder: Path, site: str, waiting: Sequence[Asked]) -> None:
    """Whether all jobs and drafts have room, the caller's own draft among them.

    Raises:
        Overloaded: too many wait or arrive, of everybody or of this site; too many jobs or bytes are held;
            or the disk would be too full.
    """
    drafts = {path: path.stem.split(",", 2) for path in folder.glob("*,*,*.draft")}
    sites = [job.site for job in waiting] + [told[2] for told in drafts.values()]
    if len(sites) > WAITING or sites.count(site) > WAITING_PER_SITE:
        fact = f"{len(sites) - 1} jobs wait or arrive, {sites.count(site) - 1} of them of {site}."
        raise Overloaded(fact, "Ask again later.", retry_s=RETRY_S)
    here = {path: read_stat(path / "body", "st_size") for path in drafts}
    coming = sum(max(0, int(told[1]) - int(here[path])) for path, told in drafts.items())
    files = list(glob.iglob("*/*", root_dir=folder))  # which lets others erase meanwhile
    held = coming + sum(int(read_stat(folder / file, "st_size")) for file in files)
    count = sum(path.is_dir() for path in folder.iterdir())
    if held > HELD_BYTES or count > KEPT:
        fact = f"{count} jobs would hold {held // 2**20} MiB of {HELD_BYTES // 2**20}."
        raise Overloaded(fact, "Fetch results, or ask again later.", retry_s=RETRY_S)
    if shutil.disk_usage(folder).free - coming < FREE_BYTES:
        raise Overloaded("The disk is too full for jobs.", "Free disk space.", retry_s=RETRY_S)


def read_stat(path: Path, name: str = "st_mtime", absent: float = 0.0) -> float:
    """A number that the file system knows of a path; `absent` where there is none any more."""
    try:
        return float(getattr(path.stat(), name))
    except OSError:
        return absent
