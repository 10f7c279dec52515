"""A promotion is killed at each of its statements, and approved by eight at once: one truth."""

import gc
import os
import shutil
import signal
import subprocess
import sys

import pytest

from imaging.config import Places
from registry.access import Acting, admit
from registry.ledger import open_ledger
from registry.mirror import drain, expected_aliases
from registry.promotion import approve, request
from registry.registration import register
from registry.store import open_store
from tests.tiny_registry import ROOT, TASK, make_places, write_stages

SOAK = bool(os.environ.get("FORMULARY_SOAK"))
CHILD = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from imaging.config import Places
from registry.access import Acting
from registry.signing import load_signer
from registry.ledger import open_ledger
from registry.promotion import approve, request

left, root, build, var, work = int(sys.argv[1]), *map(Path, sys.argv[2:5]), sys.argv[5]

def count(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

places = Places(root=root, build=build, var=var)
ledger = open_ledger(var)
if work == "mirror":
    from registry.store import open_store
    open_store(var)
for name in ("before_cursor_execute", "commit"):
    event.listen(Engine, name, count)
if work == "approve":
    approve(Acting(places, ledger, load_signer(var, "approver@test"), "It was read."), "brain-tissue", 2)
elif work == "mirror":
    from registry.mirror import drain
    drain(places, ledger)
print("done")
"""


def make_open_request(folder):
    """Version 1 serves, and MLflow knows; version 2 is asked for."""
    places = make_places(folder)
    ledger = open_ledger(places.var)
    author = admit(places.var, ledger, "author@test")
    approver = admit(places.var, ledger, "approver@test")
    for number, content in ((1, "one"), (2, "two")):
        register(write_stages(places, content), ledger, TASK, author)
        request(Acting(places, ledger, author), TASK, number)
        if number == 1:
            approve(Acting(places, ledger, approver, "It was read."), TASK, 1)
    drain(places, ledger)
    return places


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return make_open_request(tmp_path_factory.mktemp("asked"))


def copy(places, folder):
    """The same var elsewhere; MLflow's artefacts stay where they are."""
    gc.collect()  # a ledger that nobody holds any more would take its -wal file away in the middle
    shutil.copytree(places.var, folder / "var")
    return Places(root=places.root, build=places.build, var=folder / "var")


def run(places, work, kill_at):
    """The exit status of a child that dies at a statement, if there are so many."""
    command = [sys.executable, "-c", CHILD, str(kill_at), places.root, places.build, places.var, work]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)


def settle(places):
    """What the ledger says, once MLflow was told again; both agree."""
    ledger = open_ledger(places.var)
    ledger.verify()
    drain(places, ledger)
    client = open_store(places.var)
    told = {name: int(number) for name, number in client.get_registered_model(TASK).aliases.items()}
    assert told == expected_aliases(ledger, TASK)
    assert ledger.pending() == []
    assert not ledger.events(TASK, "incident")
    return {site: held.version for site, held in ledger.champions(TASK).items()}


def test_kill_9_at_any_statement_of_an_approval_leaves_all_of_it_or_nothing(asked, tmp_path):
    seen, number = [], 1
    while True:
        places = copy(asked, tmp_path / str(number))
        done = run(places, "approve", number)
        if done.returncode != -signal.SIGKILL:
            assert done.stdout == "done\n", done.stderr
            break
        ledger = open_ledger(places.var)
        ledger.verify()
        seen.append({site: held.version for site, held in ledger.champions(TASK).items()})
        if SOAK or number % 6 == 0:  # MLflow is slow to open
            assert settle(places) == seen[-1]
        shutil.rmtree(places.var)
        number += 1
    assert number > 8
    assert set(settle(places).values()) == {2}
    assert all(len(set(where.values())) == 1 and len(where) == 5 for where in seen)  # no half-moved network


def test_kill_9_at_any_statement_of_the_mirror_is_made_good_by_the_next_poll(asked, tmp_path):
    base = copy(asked, tmp_path / "approved")
    ledger = open_ledger(base.var)
    approver = admit(base.var, ledger, "approver@test")
    approve(Acting(base, ledger, approver, "It was read."), TASK, 2)
    step, number = 1 if SOAK else 113, 1
    while True:
        places = copy(base, tmp_path / str(number))
        done = run(places, "mirror", number)
        assert set(settle(places).values()) == {2}
        shutil.rmtree(places.var)
        if done.returncode != -signal.SIGKILL:
            assert done.stdout == "done\n", done.stderr
            break
        number += step
    assert number > step


APPROVER = """
import sys
from pathlib import Path
from imaging.config import Places
from imaging.errors import Conflict
from registry.access import Acting
from registry.signing import load_signer
from registry.ledger import open_ledger
from registry.promotion import approve

root, build, var = map(Path, sys.argv[1:4])
places, ledger = Places(root=root, build=build, var=var), open_ledger(var)
signer = load_signer(var, f"approver{sys.argv[4]}@test")
print("ready", flush=True)
sys.stdin.readline()
try:
    approve(Acting(places, ledger, signer, "It was read."), "brain-tissue", int(sys.argv[5]))
    print("won")
except Conflict as error:
    print(error)
"""


@pytest.mark.parametrize("versions", [1, 8], ids=["one version", "eight versions"])
def test_of_eight_promoters_at_once_exactly_one_wins_and_the_others_hear_who(database, tmp_path, versions):
    places = make_places(tmp_path)
    ledger = open_ledger(places.var)
    author = admit(places.var, ledger, "author@test")
    for number in range(1, versions + 1):
        register(write_stages(places, f"v{number}", locked=str(number)), ledger, TASK, author)
        request(Acting(places, ledger, author), TASK, number)
    for number in range(8):
        admit(places.var, ledger, f"approver{number}@test")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", APPROVER, places.root, places.build, places.var, str(number),
                          str(number % versions + 1)], env=environment, text=True, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
        for number in range(8)
    ]  # fmt: skip
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    told = [child.communicate(timeout=60)[0].strip() for child in children]
    winner = f"approver{told.index('won')}@test"
    assert told.count("won") == 1
    assert all(winner in line for line in told if line != "won"), told
    assert ledger.verify() == len(ledger.events())
    assert {held.version for held in ledger.champions(TASK).values()} == {told.index("won") % versions + 1}
