"""Threads that take whatever waits: batches grow with the load, and nobody waits for a timer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Settle = Callable[[Result | None, Exception | None], None]


class GreedyWorker(Generic[Item, Result]):
    """Runs `work` on batches of what was put meanwhile.

    Args:
        name: of its threads.
        work: from items to one result each; it may raise. A result that is an exception is that item's error.
        limit: most items in one batch.
        bisect: whether a batch that fails is halved and tried again, so that only the bad item fails.
        lanes: threads, so many batches at once.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Item]], Sequence[Result | Exception]],
        limit: int,
        bisect: bool = False,
        lanes: int = 1,
    ) -> None:
        self._work, self._limit, self._bisect = work, limit, bisect
        self._queue: queue.SimpleQueue[tuple[Item, Settle[Result]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._loop, name=f"{name}-{lane}", daemon=True) for lane in range(lanes)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Items that no batch has taken yet."""
        return self._queue.qsize()

    def put(self, item: Item, settle: Settle[Result]) -> None:
        """Queue an item; `settle` is called in a thread of this worker, with a result or an error."""
        self._queue.put((item, settle))

    def submit(self, item: Item) -> Future[Result]:
        """Queue an item; the future resolves when its batch is done."""
        future: Future[Result] = Future()

        def settle(result: Result | None, error: Exception | None) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if error:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # a result where there is no error

        self._queue.put((item, settle))
        return future

    def close(self) -> None:
        """Do what waits, then stop."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _loop(self) -> None:
        going = True
        while going:
            entries: list[tuple[Item, Settle[Result]]] = []
            entry = self._queue.get()
            while entry is not None:
                entries.append(entry)
                if len(entries) == self._limit or self._queue.empty():
                    break
                try:
                    entry = self._queue.get_nowait()
                except queue.Empty:  # another lane took it
                    break
            going = entry is not None
            if entries:
                self._settle(entries)

    def _settle(self, entries: list[tuple[Item, Settle[Result]]]) -> None:
        try:
            results = self._work([item for item, _ in entries])
        except Exception as error:  # whatever it is belongs to the one who waits, not to this thread
            if self._bisect and len(entries) > 1:
                middle = len(entries) // 2
                self._settle(entries[:middle])
                self._settle(entries[middle:])
                return
            results = [error] * len(entries)
        for (_, settle), result in zip(entries, results, strict=True):
            if isinstance(result, Exception):
                settle(None, result)
            else:
                settle(result, None)
