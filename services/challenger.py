"""The process in which a challenger runs during a silent trial: last in line, and free to die.

Started as `python -m services.challenger SOCKET`. It verifies the package itself, answers groups of cases
that come through the socket as JSON and raw bytes, and writes their rows before it says so. It ends with its
parent.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from imaging.errors import FormularyError, RegistryError, TrustError
from imaging.image import Image
from imaging.preparation import prepare
from imaging.scores import dice
from imaging.terminal import configure_logs
from imaging.vocabulary import Decision, Kind, Statement, TrialVerdict
from registry.engines import check_answers, check_parity, open_engine
from registry.evidence import verify_package
from registry.ledger import open_ledger
from registry.package import Contract, read_contract, shelf
from registry.qualified import choose_engine
from registry.trials.plan import Plan
from registry.trials.report import judge
from registry.trials.rows import Row, open_rows
from services.served import read_profile

SIZES = struct.Struct(">II")
RESTING = 9  # times as long as it worked: caches and memory have no priorities; where it is preempted, longer
GROUP_S = 60.0  # what is left of a group then is dropped: there is no time for it
JUDGING = 20  # of its time, one part at most goes into judging what there is


@dataclass(frozen=True)
class Finding:
    """An answer at the contract's operating point: yes or no, or of a segmentation a mask of labels."""

    positive: bool | None
    labels: NDArray[np.uint8] | None


def read_finding(contract: Contract, logits: NDArray[np.float32]) -> Finding:
    """The finding in an engine's logits of a batch of one."""
    if contract.kind is Kind.SEGMENTATION:
        return Finding(None, logits[0].argmax(axis=0).astype(np.uint8))
    score = contract.score(contract.probabilities(logits))[0]
    return Finding(bool(score >= contract.threshold), None)


def differ(first: Finding, second: Finding) -> float:
    """0 for the same finding, 1 for another one; of masks 1 - the mean Dice of the classes in either."""
    if first.labels is None or second.labels is None:
        return float(first.positive != second.positive)
    present = set(np.unique(first.labels)) | set(np.unique(second.labels))
    shares = [dice(first.labels, second.labels, int(label)) for label in present - {0}]
    return 1 - float(np.mean(shares)) if shares else 0.0


def send(stream: BinaryIO, told: dict[str, Any], body: bytes = b"") -> None:
    """Write one message: two sizes, JSON, bytes."""
    head = json.dumps(told).encode()
    stream.write(SIZES.pack(len(head), len(body)) + head + body)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Read one message.

    Raises:
        EOFError: the other side is gone.
    """
    sizes = stream.read(SIZES.size)
    if len(sizes) < SIZES.size:
        raise EOFError
    head, body = SIZES.unpack(sizes)
    sent = stream.read(head + body)
    if len(sent) < head + body:
        raise EOFError
    return json.loads(sent[:head]), sent[head:]


class Challenger:
    """A verified package, warm, and the rows of its trial.

    Args:
        told: var (a path), task, version, digest, trial (number of the ledger's record) and plan.

    Raises:
        TrustError: the package does not hold; an incident says so, once a trial.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        self._told, self._var = told, Path(told["var"])
        self._rows, self._plan = open_rows(self._var), Plan.model_validate(told["plan"])
        self._judge_at, self.verdict = 0.0, str(TrialVerdict.RUNNING)
        try:
            self._load()
        except TrustError as error:
            self._accuse(error)
            raise
        self.look()

    def _load(self) -> None:
        folder = shelf(self._var, self._told["digest"])
        evidence = verify_package(folder, open_ledger(self._var))
        self._contract = read_contract(folder)
        qualified = evidence.statements.get(Statement.QUALIFICATION, {})
        asked = os.environ.get("FORMULARY_ENGINE", "") if read_profile() == "cpu" else ""
        name, _, precision = choose_engine(self._var, self._contract, qualified, asked).partition("/")
        self._engine = open_engine(folder, name, precision, 1)
        check_parity(self._engine, folder, self._contract)

    def _accuse(self, error: TrustError) -> None:
        ledger, told = open_ledger(self._var), self._told
        known = ledger.events(told["task"], Decision.INCIDENT)
        if any(one.seq > told["trial"] and one.body.get("digest") == told["digest"] for one in known):
            return
        body = {"version": told["version"], "digest": told["digest"]}
        ledger.record_incident(error.fact, told["task"], body, "trial")

    def look(self) -> None:
        """Judge the trial as it stands, unless it was judged just now."""
        if time.monotonic() > self._judge_at:
            start = time.monotonic()
            self.verdict = judge(self._plan, self._rows.read(self._told["trial"]))
            self._judge_at = time.monotonic() + max(1.0, JUDGING * (time.monotonic() - start))

    def answer(self, asked: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Answer a group of cases and write their rows; what was not seen or could not be written is told."""
        rows, start, until = [], 0, time.monotonic() + GROUP_S
        for case in asked["cases"]:
            end = start + case["bytes"]
            begun = time.monotonic()
            if begun >= until:
                break
            rows.append(self._see(case, body[start:end]))
            time.sleep(RESTING * (time.monotonic() - begun))
            start = end
        dropped = len(asked["cases"]) - len(rows)
        try:
            self._rows.append(rows, self._told["trial"], asked["dropped"] + dropped)
        except RegistryError as error:
            return {"unwritten": str(error)}
        self.look()
        failed = sum(bool(row.failure) for row in rows)
        told = {"answered": len(rows) - failed, "failed": failed, "dropped": dropped}
        return {**told, "verdict": self.verdict}

    def _see(self, case: dict[str, Any], body: bytes) -> Row:
        facts = {**case["row"], "trial": self._told["trial"]}
        if case["failure"]:
            return Row(**facts, difference=1.0, positive=None, failure=case["failure"])
        size = 4 * int(np.prod(case["shape"]))
        pixels = np.frombuffer(body[:size], np.float32).reshape(case["shape"])
        start, spent = time.perf_counter(), time.process_time()
        try:
            own = self._find(pixels, case["spacing_mm"])
            sent = np.frombuffer(body[size:], np.uint8)
            mask = None if own.labels is None else sent.reshape(own.labels.shape)
        except Exception as error:  # whatever it is, it is the challenger's failure and not its end
            return Row(**facts, difference=1.0, positive=None, failure=type(error).__name__)
        wall_ms, cpu_ms = 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - spent)
        difference = differ(Finding(facts["champion_positive"], mask), own)
        return Row(**facts, difference=difference, positive=own.positive, wall_ms=wall_ms, cpu_ms=cpu_ms)

    def _find(self, pixels: NDArray[np.float32], spacing_mm: list[float] | None) -> Finding:
        image = Image(pixels, (spacing_mm[0], spacing_mm[1]) if spacing_mm else None)
        self._contract.check(image)
        answers = self._engine.run(prepare(image.pixels, self._contract.preparation)[None])
        check_answers(answers, self._contract, 1)
        return read_finding(self._contract, answers.logits)


def _main(number: int) -> None:
    os.nice(19)
    if sys.platform == "linux":  # whoever else is ready to run runs at once
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the gateway; its end is ours
    configure_logs(("imaging", "registry", "services"))
    with socket.socket(fileno=number) as end:
        stream = cast("BinaryIO", end.makefile("rwb"))
        try:
            told, _ = receive(stream)
            challenger = Challenger(told)
            send(stream, {"verdict": challenger.verdict})
            while True:
                send(stream, challenger.answer(*receive(stream)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except FormularyError as error:
            send(stream, {"refused": str(error)})


if __name__ == "__main__":
    _main(int(sys.argv[1]))
