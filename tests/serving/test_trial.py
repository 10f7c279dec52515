"""A silent trial beside live traffic: it sees every case, answers nobody, and may die; then a canary."""

import itertools
import json
import subprocess
import sys

import numpy as np
import psutil
import pytest
import yaml

from imaging.vocabulary import Kind, Modality
from registry.access import Acting, admit
from registry.ledger import open_ledger
from registry.promotion import request
from registry.trials.plan import takes_canary
from registry.trials.rows import open_rows
from services.findings import encode
from tests.tiny import ROOT, draw_case, promote, train, write_root
from tests.tiny_gateway import NPY, Gateway, draw_pixels


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Of `nodes` and `discs` version 1 serves at north and east, version 2 is registered."""
    places = write_root(tmp_path_factory.mktemp("trial"), nodes=Kind.CLASSIFICATION, discs=Kind.SEGMENTATION)
    for task in ("nodes", "discs"):
        promote(places, task, train(places, task))
    params = yaml.safe_load((places.root / "params.yaml").read_text())
    for task in ("nodes", "discs"):
        params["tasks"][task]["fit"]["seed"] = 7
    (places.root / "params.yaml").write_text(yaml.safe_dump(params))
    assert [train(places, task) for task in ("nodes", "discs")] == [2, 2]
    return places


@pytest.fixture(scope="module")
def gateway(places):
    with Gateway(places) as running:
        yield running


def ask(gateway, number, **headers):
    pixels, *_ = draw_case(Kind.CLASSIFICATION, np.random.default_rng(number))
    body = encode(pixels, NPY, 2.0, Modality.CT)
    return gateway.post(body=body, X_Subject=f"person {number}", **headers)


def command(places, *arguments):
    """`formulary services ...` as a person runs it; what it prints, as JSON."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "FORMULARY_ROOT": str(places.root),
                   "FORMULARY_VAR": str(places.var)}  # fmt: skip
    told = subprocess.run([sys.executable, "-m", "formulary", "services", *arguments, "--json"],
                          cwd=places.root, env=environment, capture_output=True, text=True)  # fmt: skip
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


def challengers(gateway):
    family = psutil.Process(gateway.process.pid).children(recursive=True)
    running = [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in running if "services.challenger" in one.cmdline()]


def test_every_case_is_shown_and_a_killed_challenger_leaves_traffic_untouched(places, gateway):
    ask(gateway, 0)
    assert not challengers(gateway)  # without a trial nothing runs
    begun = command(places, "trial", "nodes", "2", "--size", "2000", "--margin", "0.01", "--site", "north",
                    "--because", "A test.", "--identity", "author@test")  # fmt: skip
    trial, rows = begun["trial"], open_rows(places.var)
    gateway.wait(lambda: ask(gateway, 1) and challengers(gateway))  # until the gateway knows of the trial
    gateway.wait(lambda: [one.nice() for one in challengers(gateway)] == [19])
    gateway.wait(lambda: rows.read(trial))
    asked = [ask(gateway, number) for number in range(2, 40)]
    for process in challengers(gateway):
        process.kill()
    asked += [ask(gateway, number) for number in range(40, 80)]
    assert {response.status_code for response in asked} == {200}
    assert {response.json()["version"] for response in asked} == {1}
    shown = {response.json()["id"]: response.json() for response in asked}
    gateway.wait(lambda: {row.prediction for row in rows.read(trial)} >= shown.keys(), seconds=120)
    for row in rows.read(trial):
        assert (row.champion, row.site, row.failure, row.subject is None) == (1, "north", "", False)
        if row.prediction in shown:
            assert row.champion_positive == shown[row.prediction]["positive"]
        assert row.difference == float(row.positive != row.champion_positive)
    assert ask(gateway, 80, site="east").status_code == 200  # not in the trial
    assert gateway.count("formulary_trial_starts_total", task="nodes") >= 2
    assert gateway.count("formulary_trial_cases_total", outcome="answered") == len(rows.read(trial))
    assert {row.champion_positive for row in rows.read(trial)} == {True, False}


def test_what_the_challenger_says_is_what_it_says_alone(places, gateway):
    """Its own decoding and preparation: the same answer as `formulary predict --version 2` gives."""
    from services.offline import predict_file

    body = encode(draw_pixels(500), NPY, 2.0, Modality.CT)
    told = gateway.post(body=body, X_Subject="somebody").json()
    (places.var / "case.npy").write_bytes(body)
    trial = next(iter(open_ledger(places.var).state("nodes").trials.values())).seq
    rows = open_rows(places.var)
    gateway.wait(lambda: told["id"] in {row.prediction for row in rows.read(trial)})
    row = next(row for row in rows.read(trial) if row.prediction == told["id"])
    alone = predict_file(places, places.var / "case.npy", "nodes", None, 2)
    assert row.positive == alone["positive"]


def test_masks_are_compared_by_dice(places, gateway):
    begun = command(places, "trial", "discs", "2", "--size", "400", "--margin", "0.3", "--because", "A test.",
                    "--identity", "author@test")  # fmt: skip
    rows, asked = open_rows(places.var), []
    gateway.wait(lambda: asked.append(ask(gateway, 1, task="discs")) or rows.read(begun["trial"]))
    asked += [ask(gateway, number, task="discs") for number in range(2, 12)]
    ids = {response.json()["id"] for response in asked}
    gateway.wait(lambda: {row.prediction for row in rows.read(begun["trial"])} & ids)
    found = rows.read(begun["trial"])
    assert {(row.failure, row.positive, row.champion_positive) for row in found} == {("", None, None)}
    assert 0 < np.mean([row.difference for row in found]) < 1
    told = command(places, "trial", "discs", "--stop", "--because", "Enough.", "--identity", "author@test")
    assert told["positives"] is None


def test_the_report_stops_the_trial_and_a_canary_follows(places, gateway):
    running = command(places, "trial", "nodes", "--report")
    assert running["verdict"] == "running"
    assert "without any truth" in running["compared"]
    command(places, "trial", "nodes", "--stop", "--because", "Too strict.", "--identity", "author@test")
    gateway.wait(lambda: not challengers(gateway))
    begun = command(places, "trial", "nodes", "2", "--size", "400", "--margin", "0.5", "--look", "40",
                    "--because", "A test.", "--identity", "author@test")  # fmt: skip
    numbers = iter(range(1000, 1400))
    while command(places, "trial", "nodes")["verdict"] == "running":
        for number in itertools.islice(numbers, 30):
            assert ask(gateway, number).status_code == 200
        gateway.wait(lambda: open_rows(places.var).read(begun["trial"]))
    ended = command(places, "trial", "nodes", "--stop", "--because", "Read.", "--identity", "author@test")
    assert ended["verdict"] == "passed"
    ledger = open_ledger(places.var)
    request(Acting(places, ledger, admit(places.var, ledger, "author@test")), "nodes", 2)
    command(places, "canary", "nodes", "2", "--weight", "0.3", "--because", "A test.", "--site", "north",
            "--identity", "approver@test")  # fmt: skip
    digest = ledger.version("nodes", 2)[0]
    gateway.wait(lambda: {ask(gateway, n, X_Study=f"1.2.{n}").json()["version"] for n in range(30)} == {1, 2})
    for _ in range(2):
        for n in range(60):
            told = ask(gateway, n, X_Study=f"1.2.{n}").json()
            assert told["version"] == (2 if takes_canary(f"1.2.{n}", "nodes", digest, 0.3) else 1)
    command(
        places, "canary", "nodes", "2", "--weight", "0", "--because", "Enough.", "--identity", "approver@test"
    )
    gateway.wait(lambda: {ask(gateway, n, X_Study=f"1.2.{n}").json()["version"] for n in range(30)} == {1})
