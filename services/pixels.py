"""Pixels that are kept: bodies of requests on their way to the disk, at the sites that keep pixels.

A thread of its own writes them once the answer's row is durable (services/vault.py). Nobody waits for it:
what does not fit into its queue or on the disk is dropped and counted. See docs/decisions/0015.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from typing import TYPE_CHECKING

from imaging.config import Places
from imaging.errors import ConfigError
from monitoring import telemetry
from services.problems import locate
from services.vault import Held, erase, make_room, read_days, seal, write

if TYPE_CHECKING:
    from services.case import Case

LOG = logging.getLogger(__name__)
QUEUE_BYTES = 64 * 2**20  # of bodies whose answer or whose writing is on its way
DISK_BYTES = 10 * 2**30
TIDY_S = 3600.0
STOP_S = 10.0


class KeptPixels:
    """Keeps what was answered at the sites that keep pixels; nothing before `start`.

    Args:
        places: sites.yaml, keys, and var/pixels/SITE/DAY/ID.
    """

    def __init__(self, places: Places) -> None:
        self._places, self._root = places, places.var / "pixels"
        self._most = int(os.environ.get("FORMULARY_PIXELS_BYTES") or DISK_BYTES)
        self._days: dict[str, int] = {}
        self._open = self._told = False
        self._queue: queue.SimpleQueue[tuple[Held, str] | None] = queue.SimpleQueue()
        self._lock, self._bytes = threading.Lock(), 0
        self._disk = self._since = 0  # bytes on the disk as last counted; written here since
        self._thread = threading.Thread(target=self._run, name="pixels", daemon=True)

    def start(self) -> None:
        """Keep what comes; erase what is over its time, now and every hour.

        Raises:
            ConfigError: sites.yaml cannot be read.
        """
        self._days, self._open = read_days(self._places), True
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, for ten seconds at most."""
        self._open = False
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(STOP_S)

    def hold(self, case: Case, kind: str, body: bytes) -> None:
        """Hold a body until its answer is there, where the site keeps pixels and there is room."""
        site = case.asked[1]
        if not self._open or site not in self._days:
            return
        with self._lock:
            fits = self._bytes + len(body) <= QUEUE_BYTES
            self._bytes += len(body) if fits else 0
        if fits:
            case.held = Held(site, kind, body)
        else:
            telemetry.PIXELS_DROPPED.labels(site).inc()

    def keep(self, case: Case) -> None:
        """Queue the body of a case whose row is durable; never blocks."""
        if case.held and case.row:
            self._queue.put((case.held, case.row.id))
            case.held = None

    def release(self, case: Case | None) -> None:
        """Let go of a body that no answer came of."""
        if case and case.held:
            self._let_go(case.held)
            case.held = None

    def _let_go(self, held: Held) -> None:
        with self._lock:
            self._bytes -= len(held.body)

    def _run(self) -> None:
        due = 0.0
        while True:
            if time.monotonic() >= due:
                self._tidy()
                due = time.monotonic() + TIDY_S
            try:
                taken = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            if taken is None:
                return
            self._take(*taken)

    def _take(self, held: Held, number: str) -> None:
        try:
            if self._since > self._most // 100:  # other workers write, too
                self._tidy()
            self._write(held, number)
        except Exception as error:  # the thread must live; a body is in no message
            telemetry.PIXELS_DROPPED.labels(held.site).inc()
            if not self._told:
                LOG.error("the pixels of an answer at %s were not kept: %s", held.site, locate(error))
            self._told = True  # until the disk is looked at again: the next thousand say the same
        finally:
            self._let_go(held)

    def _write(self, held: Held, number: str) -> None:
        sealed = seal(self._places.var, held, number)
        if self._disk + self._since + len(sealed) > self._most:
            telemetry.PIXELS_DROPPED.labels(held.site).inc()
            return
        write(self._root, held.site, number, sealed)
        self._since += len(sealed)

    def _tidy(self) -> None:
        """Follow sites.yaml; erase what is over its time, and what the disk has no room for."""
        try:
            self._days = read_days(self._places)
        except ConfigError as error:
            LOG.error("pixels are kept and erased as before: %s", error)
        try:
            erase(self._root, self._days)
            self._disk, self._since = make_room(self._root, self._most), 0
            self._told = False
        except OSError as error:
            LOG.error("pixels could not be erased or counted: %s", locate(error))
