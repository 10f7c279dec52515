"""One worker that takes whatever waits: batches grow with the load, and nobody waits for a timer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class GreedyWorker(Generic[Item, Result]):
    """Runs `work` in one thread on batches of what was submitted meanwhile.

    Args:
        name: of the thread.
        work: from items to one result each; it may raise.
        limit: most items in one batch.
        bisect: whether a batch that fails is halved and tried again, so that only the bad item fails.
    """

    def __init__(
        self, name: str, work: Callable[[list[Item]], Sequence[Result]], limit: int, bisect: bool = False
    ) -> None:
        self._work, self._limit, self._bisect = work, limit, bisect
        self._queue: queue.SimpleQueue[tuple[Item, Future[Result]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> Future[Result]:
        """Queue an item; the future resolves when its batch is done."""
        future: Future[Result] = Future()
        self._queue.put((item, future))
        return future

    def close(self) -> None:
        """Do what waits, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        going = True
        while going:
            waiting = [self._queue.get()]
            while len(waiting) < self._limit and not self._queue.empty():
                waiting.append(self._queue.get())
            going = None not in waiting
            items = [
                entry for entry in waiting if entry is not None and entry[1].set_running_or_notify_cancel()
            ]
            if items:
                self._settle(items)

    def _settle(self, items: list[tuple[Item, Future[Result]]]) -> None:
        try:
            results = self._work([item for item, _ in items])
        except Exception as error:  # whatever it is belongs to the one who waits, not to this thread
            if self._bisect and len(items) > 1:
                middle = len(items) // 2
                self._settle(items[:middle])
                self._settle(items[middle:])
                return
            for _, future in items:
                future.set_exception(error)
            return
        for (_, future), result in zip(items, results, strict=True):
            future.set_result(result)
