"""The runner: greedy batches, deadlines, and one bad image that fails alone."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from imaging.errors import Expired, Overloaded, TrustError
from imaging.vocabulary import Kind
from registry.engines import Answers
from services.prediction import _admit
from services.runner import Runner, Waiting
from tests.tiny import promise

TINY = {"kind": Kind.CLASSIFICATION, "classes": ("none", "disc")}

POISON = 13.0


class Engine:
    """Answers the mean of each image, at a pace of its own; an image of 13 makes the whole call fail."""

    name = "fake/f32"

    def __init__(self):
        self.sizes, self.free = [], threading.Event()
        self.free.set()

    def run(self, batch):
        self.free.wait(10)
        self.sizes.append(len(batch))
        if (batch == POISON).any():
            raise ValueError("poison")
        means = batch.mean(axis=(1, 2, 3))
        return Answers(np.stack([means, -means], axis=1), batch[:, 0], means[:, None])


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def runner(engine):
    running = Runner(engine, promise(**TINY, max_batch=8))
    yield running
    engine.free.set()
    running.close()


def draw(value, runner):
    return np.full(runner._contract.shape, value, np.float32)


def ask(runner, value, deadline=float("inf")):
    future: Future = Future()
    waiting = Waiting(draw(value, runner), deadline)
    runner.put(waiting, lambda ran, error: future.set_result((ran, error)))
    return future


def test_what_waits_while_the_engine_works_is_the_next_batch(engine, runner):
    engine.free.clear()
    first = runner.submit(draw(1, runner))
    time.sleep(0.1)
    rest = [runner.submit(draw(value, runner)) for value in range(2, 14) if value != POISON]
    engine.free.set()
    answers = [future.result(10).answers.logits[0, 0] for future in [first, *rest]]
    assert answers == list(range(1, 13))
    assert engine.sizes == [1, 8, 3]


def test_each_answer_says_its_place_in_its_batch(engine, runner):
    engine.free.clear()
    asked = [ask(runner, 1)]
    time.sleep(0.1)
    asked += [ask(runner, value) for value in (2, 3)]
    engine.free.set()
    told = [future.result(10)[0] for future in asked]
    assert [ran.batch for ran in told] == ["0:1", "0:2", "1:2"]
    assert [float(ran.answers.logits[0, 0]) for ran in told] == [1, 2, 3]


def test_a_poisoned_image_fails_alone(engine, runner):
    engine.free.clear()
    first = runner.submit(draw(1, runner))
    time.sleep(0.1)
    asked = {value: runner.submit(draw(value, runner)) for value in (2, 3, POISON, 4, 5)}
    engine.free.set()
    assert first.result(10).answers.logits[0, 0] == 1
    assert isinstance(asked.pop(POISON).exception(10), ValueError)
    assert [future.result(10).answers.logits[0, 0] for future in asked.values()] == [2, 3, 4, 5]


def test_what_is_late_is_told_so_and_never_run(engine, runner):
    engine.free.clear()
    first = ask(runner, 1)
    time.sleep(0.1)
    late, good = ask(runner, 2, time.monotonic() + 0.05), ask(runner, 3)
    time.sleep(0.2)
    engine.free.set()
    assert isinstance(late.result(10)[1], Expired)
    assert good.result(10)[0].batch == "0:1"
    assert first.result(10)[1] is None
    assert engine.sizes == [1, 1]


def test_answers_that_are_not_what_the_contract_promises_are_no_answers(engine, runner):
    engine.run = lambda batch: Answers(np.full((len(batch), 2), np.nan), batch[:, 0], batch[:, 0, 0])
    assert isinstance(runner.submit(draw(1, runner)).exception(10), TrustError)


def test_the_wait_is_told_by_the_pace_and_by_what_waits(engine, runner):
    assert runner.wait_s() == 0
    slow = engine.run
    engine.run = lambda batch: (time.sleep(0.05), slow(batch))[1]
    runner.submit(draw(1, runner)).result(10)
    alone = runner.wait_s()
    assert alone == pytest.approx(0.05, abs=0.04)
    engine.free.clear()
    asked = [runner.submit(draw(1, runner)) for _ in range(30)]
    time.sleep(0.1)
    assert runner.wait_s() > alone + 20 * 0.05
    engine.free.set()
    assert all(future.result(30) for future in asked)


def test_two_lanes_run_two_batches_at_once(engine):
    running, together = (
        Runner(engine, promise(**TINY, max_batch=1), lanes=2),
        threading.Barrier(2),
    )
    run = engine.run
    engine.run = lambda batch: (together.wait(10), run(batch))[1]
    asked = [running.submit(draw(value, running)) for value in (1, 2)]
    assert [future.result(10).answers.logits[0, 0] for future in asked] == [1, 2]
    running.close()


def test_nobody_is_refused_for_the_memory_of_a_slow_batch_when_nobody_waits():
    runner = SimpleNamespace(wait_s=lambda: 5.0, pending=0, most_pending=48)
    served = SimpleNamespace(runner=runner, contract=SimpleNamespace(task="t"))
    _admit(served, time.monotonic() + 1)
    runner.pending = 1
    with pytest.raises(Overloaded, match=r"5\.00 s"):
        _admit(served, time.monotonic() + 1)
    _admit(served, time.monotonic() + 10)
    runner.pending = 48
    with pytest.raises(Overloaded):
        _admit(served, time.monotonic() + 10)
