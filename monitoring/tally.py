"""Counts that become rows: at once in memory, on disk by a thread of its own, bounded against strangers."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from imaging.errors import JournalDown

LOG = logging.getLogger(__name__)
KINDS = 32  # that are kept apart in one `every_s`; what goes beyond is counted by its outline alone
RETRY_S = 10.0
One = TypeVar("One", bound=Hashable)


class Tally(Generic[One]):
    """Counts what it is told, and writes the counts, so that nobody who tells waits for a disk.

    A row is written as soon as its kind was not written for `every_s`; what comes in between is counted into
    the next row. What cannot be written is kept, and tried again.

    Args:
        name: of the thread, and in the log.
        write: makes the counts durable; raises JournalDown where it cannot.
        outline: what a kind too many is counted as; a kind that is its own outline is never too many.
        every_s: at most one row a kind in so many seconds.
        kinds: that are kept apart in this time.
    """

    def __init__(
        self, name: str, write: Callable[[Counter[One]], None], outline: Callable[[One], One],
        every_s: float = 60.0, kinds: int = KINDS,
    ) -> None:  # fmt: skip
        self._name, self._write_rows, self._outline = name, write, outline
        self.every_s, self.retry_s, self._kinds = every_s, min(RETRY_S, every_s), kinds
        self._lock, self._wake, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self._counts: Counter[One] = Counter()
        self._next: dict[One, float] = {}
        self._thread: threading.Thread | None = None

    def note(self, one: One) -> None:
        """Count one; microseconds."""
        with self._lock:
            if self._is_one_too_many(one):
                one = self._outline(one)
            self._counts[one] += 1
            if not self._thread:  # not earlier: a process that only loads this file needs no thread
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
        if one not in self._next:
            self._wake.set()

    def close(self) -> None:
        """Write what is counted, and stop."""
        self._stop.set()
        self._wake.set()
        if self._thread:
            self._thread.join(RETRY_S)
        self._try(everything=True)

    def _is_one_too_many(self, one: One) -> bool:
        if one in self._counts or one in self._next or self._outline(one) == one:
            return False
        return sum(self._outline(kind) != kind for kind in {*self._next, *self._counts}) >= self._kinds

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self.retry_s)
            self._wake.clear()
            if not self._try():
                self._stop.wait(self.retry_s)

    def _try(self, everything: bool = False) -> bool:
        try:
            self._write(everything)
        except JournalDown as error:
            LOG.error("%s Counts of %s are kept, and tried again.", error.fact, self._name)
            return False
        return True

    def _write(self, everything: bool) -> None:
        now = time.monotonic()
        with self._lock:
            self._next = {one: due for one, due in self._next.items() if due > now}
            due = Counter({one: n for one, n in self._counts.items() if everything or one not in self._next})
            self._counts -= due
            self._next |= dict.fromkeys(due, now + self.every_s)
        try:
            if due:
                self._write_rows(due)
        except BaseException:
            with self._lock:
                self._counts += due
                self._next = {one: until for one, until in self._next.items() if one not in due}
            raise
