"""The runner: owns an engine and answers prepared images in greedy batches, each within its deadline."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from imaging.errors import Expired, ServingError
from imaging.greedy import GreedyWorker
from monitoring import telemetry
from registry.engines import Answers, Engine, check_answers
from registry.package import Contract

MOST_PENDING = 48  # a lane; more that wait lengthen everybody's wait and answer no image more
NEWEST = 0.2  # weight of the newest batch in the running mean of times


class Waiting(NamedTuple):
    """A prepared image, float32 as the contract's shape, and until when (`time.monotonic`) it is wanted."""

    prepared: NDArray[np.float32]
    deadline: float


class Ran(NamedTuple):
    """Answers of a batch of one, and which place of a batch of which size it had: 3:32."""

    answers: Answers
    batch: str


class Runner:
    """One package on one engine; the contract fixes the shape, so one queue is one bucket of shapes.

    Args:
        engine: it may be called from `lanes` threads at once.
        contract: what its answers are held to.
        lanes: batches in flight.

    Attributes:
        pending: requests whose body has come and that have no answer yet; the event loop counts them.
        most_pending: so many are taken.
    """

    def __init__(self, engine: Engine, contract: Contract, lanes: int = 1) -> None:
        self._engine, self._contract, self._lanes = engine, contract, lanes
        self._batch_s = self._image_s = 0.0
        self._running, self._lock = 0, threading.Lock()
        self.pending, self.most_pending = 0, MOST_PENDING * lanes
        self._worker: GreedyWorker[Waiting, Ran] = GreedyWorker(
            f"engine-{contract.task}", self._run, contract.max_batch, bisect=True, lanes=lanes
        )

    def put(self, waiting: Waiting, settle: Callable[[Ran | None, Exception | None], None]) -> None:
        """Queue an image; `settle` is called in an engine's thread."""
        self._worker.put(waiting, settle)

    def submit(self, prepared: NDArray[np.float32]) -> Future[Ran]:
        """Queue an image that has all the time in the world."""
        return self._worker.submit(Waiting(prepared, math.inf))

    def wait_s(self) -> float:
        """How long an image that is put now will wait for the engine's answer, by the pace of late."""
        return self._batch_s + self._image_s * (self._worker.waiting + self._running) / self._lanes

    def close(self) -> None:
        """Answer what waits, then stop."""
        self._worker.close()

    def _run(self, waiting: list[Waiting]) -> list[Ran | Exception]:
        now = time.monotonic()
        alive = [index for index, one in enumerate(waiting) if one.deadline > now]
        told: list[Ran | Exception] = [
            Expired("The deadline passed before an engine was free.", "Ask again later, or allow more time.")
        ] * len(waiting)
        if alive:
            self._count(len(alive))
            try:
                answers = self._engine.run(np.stack([waiting[index].prepared for index in alive]))
                check_answers(answers, self._contract, len(alive))
            except ServingError as error:  # the device's fault and no image's: halving would find nothing
                return [error] * len(waiting)
            finally:
                self._count(-len(alive))
            self._learn(time.monotonic() - now, len(alive))
            for place, index in enumerate(alive):
                part = slice(place, place + 1)
                one = Answers(answers.logits[part], answers.heat[part], answers.embedding[part])
                told[index] = Ran(one, f"{place}:{len(alive)}")
        return told

    def _count(self, images: int) -> None:
        with self._lock:  # lanes change it at the same time
            self._running += images

    def _learn(self, spent_s: float, count: int) -> None:
        telemetry.BATCH.labels(self._contract.task).observe(count)
        share = NEWEST if self._batch_s else 1.0
        self._batch_s += share * (spent_s - self._batch_s)
        self._image_s += share * (spent_s / count - self._image_s)
