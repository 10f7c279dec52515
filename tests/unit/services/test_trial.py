"""The lane of a trial: bounded, never waiting, and a case that kills the challenger is found and told."""

import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from imaging.config import Places
from imaging.image import Image
from imaging.vocabulary import Kind
from registry.state import Placement, Trial
from registry.trials.plan import Plan
from registry.trials.rows import open_rows
from services.challenger import Challenger, Finding, differ, read_finding
from services.trial import CRASHED, MOST_CASES, Lane, Offered, Shadow
from tests.tiny import ROOT, promise

STAND_IN = """
import json, os, socket, sys
from services.challenger import receive, send
with socket.socket(fileno=int(sys.argv[1])) as end:
    stream = end.makefile("rwb")
    told, _ = receive(stream)
    send(stream, {"verdict": "running"})
    while True:
        asked, body = receive(stream)
        if any(case["row"]["prediction"] == "killer" and not case["failure"] for case in asked["cases"]):
            os.abort()
        with open(told["var"] + "/seen.jsonl", "a") as file:
            for case in asked["cases"]:
                file.write(json.dumps([case["row"]["prediction"], case["failure"]]) + "\\n")
        send(stream, {"answered": len(asked["cases"]), "failed": 0, "dropped": 0, "verdict": "running"})
"""
TRIAL = Trial(9, Placement(2, "sha256:b", "2026-01-01"), "sha256:a", Plan(size=100, margin=0.1))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A stand-in for the challenger's process: it aborts on one case, as a segfault would."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr("services.trial.COMMAND", [sys.executable, str(tmp_path / "stand_in.py")])
    monkeypatch.setattr("services.trial.PACE_S", 0.02)
    monkeypatch.setattr("services.trial.WAIT_S", 0.02)
    return Places(root=ROOT, build=tmp_path, var=tmp_path)


def offered(name, side=4):
    return Offered({"prediction": name}, Image(np.zeros((side, side), np.float32)), None)


def seen(places):
    import json

    path = places.var / "seen.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_of_a_group_that_killed_the_challenger_only_the_killer_is_told_as_a_failure(places):
    lane = Lane(places, "t", TRIAL, lambda _: True)
    names = ["a", "b", "killer", "c"]
    for name in names:
        lane.put(offered(name))
    lane.start()
    deadline = time.monotonic() + 60
    while len(seen(places)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    lane.close()
    assert not lane.is_alive()
    assert seen(places) == [["a", ""], ["b", ""], ["killer", CRASHED], ["c", ""]]


def test_a_full_lane_drops_at_once_by_count_and_by_bytes(places):
    lane = Lane(places, "t", TRIAL, lambda _: True)
    start = time.perf_counter()
    for number in range(MOST_CASES + 50):
        lane.put(offered(str(number)))
    assert time.perf_counter() - start < 1
    assert (len(lane._waiting), lane._dropped) == (MOST_CASES, 50)
    large = Lane(places, "t", TRIAL, lambda _: True)
    for _ in range(10):
        large.put(offered("large", 1024))  # 4 MiB
    assert (len(large._waiting), large._dropped) == (8, 2)


def test_cases_of_another_champion_or_another_site_are_not_shown(places):
    shadow = Shadow(places, lambda: {("t", "north"): TRIAL})
    for site, digest in (("east", "sha256:a"), ("north", "sha256:b"), ("north", "sha256:c")):
        shadow.offer(SimpleNamespace(asked=("t", site, "1"), served=SimpleNamespace(digest=digest)))
    assert shadow._lanes == {}


def test_what_a_group_has_no_time_for_is_dropped_and_counted(tmp_path, monkeypatch):
    challenger = Challenger.__new__(Challenger)  # without a package: nothing is answered
    challenger._told, challenger._rows, challenger._judge_at = {"trial": 9}, open_rows(tmp_path), math.inf
    challenger.verdict = "running"
    monkeypatch.setattr("services.challenger.GROUP_S", 0.0)
    told = challenger.answer({"cases": [{"bytes": 0}] * 5, "dropped": 3}, b"")
    assert told == {"answered": 0, "failed": 0, "dropped": 5, "verdict": "running"}
    assert challenger._rows.dropped(9) == 8


def test_a_challenger_runs_on_the_cpu_beside_a_gateway_of_the_gpu(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("services.challenger.verify_package", lambda *_: SimpleNamespace(statements={}))
    monkeypatch.setattr("services.challenger.read_contract", lambda _: promise(Kind.CLASSIFICATION))
    monkeypatch.setattr("services.challenger.check_parity", lambda *_: 0.0)
    monkeypatch.setattr("services.challenger.open_engine", lambda _, *name: asked.append(name[:2]))
    challenger = Challenger.__new__(Challenger)
    challenger._told, challenger._var = {"digest": "sha256:" + "7" * 64}, tmp_path
    for profile, engine in (("gpu", "torch-cuda/f16"), ("cpu", "onnxruntime/f32")):
        monkeypatch.setenv("FORMULARY_PROFILE", profile)
        monkeypatch.setenv("FORMULARY_ENGINE", engine)
        challenger._load()
    assert asked == [("openvino", "f32"), ("onnxruntime", "f32")]


def test_findings_differ_by_yes_or_no_and_masks_by_dice():
    contract = promise(Kind.CLASSIFICATION, classes=("no", "yes"))
    yes, no = (read_finding(contract, np.array([logits], np.float32)) for logits in ([0, 1], [1, 0]))
    assert (yes.positive, no.positive, differ(yes, yes), differ(yes, no)) == (True, False, 0, 1)
    first, second = np.zeros((2, 4, 4), np.uint8)
    assert differ(Finding(None, first), Finding(None, second)) == 0
    first[0], second[:2] = 1, 1  # 4 of 4 and 8 pixels: Dice 2/3
    assert differ(Finding(None, first), Finding(None, second)) == pytest.approx(1 / 3)
    second[3] = 2  # a class that only one has: Dice 0
    assert differ(Finding(None, first), Finding(None, second)) == pytest.approx(1 - 1 / 3)
