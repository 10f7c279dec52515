"""Silent trials beside live traffic: what was answered is shown to a challenger, when there is time for it.

Each trial has a lane: a bounded queue, a thread, and the challenger's process (`services.challenger`). Nobody
waits for a lane. A process that dies is started again, ever later; what killed it is found by showing the
cases of its last group alone, and counts as the challenger's failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places
from imaging.vocabulary import TrialVerdict
from monitoring import telemetry
from registry.state import Trial
from services.challenger import receive, send

if TYPE_CHECKING:
    from imaging.image import Image
    from services.case import Case

LOG = logging.getLogger(__name__)
MOST_CASES, MOST_BYTES = 256, 32 * 2**20  # that wait in a lane; more are dropped
GROUP = 64
PACE_S = 0.25  # between two groups: one commit for each
ANSWER_S = 300.0  # a group takes long where live traffic has both cores; longer is a process that hangs
WAIT_S, MOST_WAIT_S = 1.0, 60.0  # before a process is started again
COMMAND = [sys.executable, "-m", "services.challenger"]
CRASHED = "its process ended"
Key = tuple[str, str]


@dataclass(frozen=True)
class Offered:
    """A case in a lane: facts of its row, the image as it was decoded, the champion's mask if it is one.

    The challenger prepares the image itself, by its own contract.
    """

    row: dict[str, Any]
    image: Image
    labels: NDArray[np.uint8] | None
    failure: str = ""

    @property
    def size_bytes(self) -> int:
        """Of its arrays."""
        return self.image.pixels.nbytes + (0 if self.labels is None else self.labels.nbytes)


class Shadow:
    """Shows answered cases to the challengers of their trials.

    Args:
        places: where the packages and the rows lie.
        trials: what goes on now: (task, site) -> trial.
    """

    def __init__(self, places: Places, trials: Callable[[], Mapping[Key, Trial]]) -> None:
        self._places, self._trials = places, trials
        self._lanes: dict[int, Lane] = {}

    def offer(self, case: Case) -> None:
        """Queue a case whose reply was sent, or drop it. From the event loop alone; it never blocks."""
        trial = self._trials().get((case.asked[0], case.asked[1]))
        if trial is None or trial.against != case.served.digest:
            return
        row, taken, found = case.row, case.taken, case.found
        if row is None or taken is None or found is None:  # it was not answered
            return
        lane = self._lanes.get(trial.seq)
        if lane is None or not lane.is_alive():
            lane = self._lanes[trial.seq] = Lane(self._places, case.asked[0], trial, self._stands)
            lane.start()
        facts = {"prediction": row.id, "site": row.site, "subject": row.subject, "champion": row.version,
                 "champion_positive": found.positive,
                 "champion_ms": case.stages_ms["engine"]}  # fmt: skip
        lane.put(Offered(facts, taken.image, found.labels))

    def close(self) -> None:
        """End every lane and its process; what waits is not shown any more."""
        for lane in self._lanes.values():
            lane.close()

    def _stands(self, trial: Trial) -> bool:
        return any(one.seq == trial.seq for one in self._trials().values())


class Lane(threading.Thread):
    """One trial's queue and process.

    Args:
        places: where the packages and the rows lie.
        task: the task.
        trial: what is tried.
        stands: whether a trial still goes on.
    """

    def __init__(self, places: Places, task: str, trial: Trial, stands: Callable[[Trial], bool]) -> None:
        super().__init__(name=f"trial-{trial.seq}", daemon=True)
        self._places, self._task, self._trial, self._stands = places, task, trial, stands
        self._waiting: deque[Offered] = deque()
        self._alone: deque[Offered] = deque()
        self._bytes = self._dropped = self._failures = 0
        self._news, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: BinaryIO | None = None
        self.verdict = str(TrialVerdict.RUNNING)

    def put(self, case: Offered) -> None:
        """Queue a case, or drop it where too much waits; a trial that has its verdict takes none."""
        if self.verdict != TrialVerdict.RUNNING:
            return
        with self._lock:
            full = len(self._waiting) >= MOST_CASES or self._bytes + case.size_bytes > MOST_BYTES
            if full:
                self._dropped += 1
            else:
                self._waiting.append(case)
                self._bytes += case.size_bytes
        if full:
            telemetry.TRIAL.labels(self._task, "dropped").inc()
        self._news.set()

    def close(self) -> None:
        """End the process, which may be in the middle of a group, and the thread."""
        self._closed.set()
        self._news.set()
        self._end_process()
        self.join(timeout=5)

    def run(self) -> None:
        """Show what waits, group by group, until the trial ends."""
        try:
            while self._stands(self._trial) and not self._closed.wait(PACE_S):
                self._news.wait(timeout=1.0)
                self._step()
        finally:
            self._end_process()
            self._waiting.clear()
            self._alone.clear()

    def _step(self) -> None:
        if self.verdict != TrialVerdict.RUNNING:
            self._end_process()
        elif group := self._take():
            self._show(group)

    def _take(self) -> list[Offered]:
        """The next group; after a crash the cases of the last one, each alone."""
        self._news.clear()
        if self._alone:
            self._news.set()
            return [self._alone.popleft()]
        with self._lock:
            group = [self._waiting.popleft() for _ in range(min(GROUP, len(self._waiting)))]
            self._bytes -= sum(case.size_bytes for case in group)
            if self._waiting:
                self._news.set()
        return group

    def _show(self, group: list[Offered]) -> None:
        try:
            stream = self._stream or self._start_process()
        except (OSError, EOFError, ValueError) as error:
            LOG.error("trial %d: the challenger does not start: %s", self._trial.seq, error)
            self._alone.extendleft(reversed(group))
            self._back_off()
            return
        try:
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            send(stream, *_pack(group, dropped))
            self._note(receive(stream)[0], len(group) + dropped)
        except (OSError, EOFError, ValueError):
            self._crash(group, dropped)

    def _note(self, told: dict[str, Any], shown: int) -> None:
        if "unwritten" in told:
            LOG.error("trial %d: %s", self._trial.seq, told["unwritten"])
            with self._lock:
                self._dropped += shown
            return
        for outcome in ("answered", "failed", "dropped"):
            telemetry.TRIAL.labels(self._task, outcome).inc(told[outcome])
        self._failures, self.verdict = 0, told["verdict"]

    def _crash(self, group: list[Offered], dropped: int) -> None:
        if self._closed.is_set():
            return
        LOG.error(
            "trial %d: the challenger's process ended while it had %d cases", self._trial.seq, len(group)
        )
        with self._lock:
            self._dropped += dropped
        if len(group) == 1:  # it is told as a failure, and not shown again
            group = [replace(group[0], failure=CRASHED)]
        self._alone.extendleft(reversed(group))
        self._back_off()

    def _back_off(self) -> None:
        self._end_process()
        self._news.set()
        self._closed.wait(min(WAIT_S * 2**self._failures, MOST_WAIT_S))
        self._failures += 1

    def _start_process(self) -> BinaryIO:
        """Start it and wait until its package was verified and opened.

        Raises:
            EOFError: it died.
            ValueError: it refuses, with the reason.
        """
        telemetry.TRIAL_STARTS.labels(self._task).inc()
        own, its = socket.socketpair()
        own.settimeout(ANSWER_S)
        with its:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
            self._process = subprocess.Popen(
                [*COMMAND, str(its.fileno())],
                stdin=subprocess.DEVNULL, env=environment, pass_fds=[its.fileno()],
            )  # fmt: skip
        with own:
            stream = cast("BinaryIO", own.makefile("rwb"))
        placed = self._trial.placed
        send(stream, {"var": str(self._places.var.resolve()), "task": self._task, "version": placed.version,
                      "digest": placed.digest, "trial": self._trial.seq,
                      "plan": self._trial.plan.model_dump(mode="json")})  # fmt: skip
        told, _ = receive(stream)
        if "refused" in told:
            raise ValueError(told["refused"])
        self._stream, self.verdict = stream, told["verdict"]
        return stream

    def _end_process(self) -> None:
        process, stream, self._process, self._stream = self._process, self._stream, None, None
        if process:
            process.kill()  # its rows are durable or not there
            process.wait()
        if stream:
            with contextlib.suppress(OSError):
                stream.close()


def _pack(group: list[Offered], dropped: int) -> tuple[dict[str, Any], bytes]:
    """A group as one message."""
    cases, parts = [], []
    for case in group:
        mask = b"" if case.labels is None else case.labels.tobytes()
        body = b"" if case.failure else case.image.pixels.astype(np.float32).tobytes() + mask
        cases.append({"row": case.row, "shape": case.image.pixels.shape, "spacing_mm": case.image.spacing_mm,
                      "bytes": len(body), "failure": case.failure})  # fmt: skip
        parts.append(body)
    return {"cases": cases, "dropped": dropped}, b"".join(parts)
