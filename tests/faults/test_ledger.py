"""The ledger is locked, its disk fills, its clock goes back, bytes change: it says so and loses nothing."""

import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta
from multiprocessing import get_context

import pytest

from imaging.errors import Conflict, TrustError
from imaging.vocabulary import Kind
from registry import audit
from registry.access import admit
from registry.audit import check_head, verify_ledger, write_head
from registry.evidence import verify_package
from registry.ledger import open_ledger
from registry.package import shelf, statements_folder
from tests.tiny import ROOT, train, write_root

SOAK = bool(os.environ.get("FORMULARY_SOAK"))
FLIPS = 1000 if SOAK else 100
WRITERS, EACH = 8, 25
COLUMNS = ("at", "kind", "task", "actor", "body", "key", "previous", "hash", "signature")


@pytest.fixture
def var(database, tmp_path):
    return tmp_path / "var"


@pytest.fixture
def ledger(var):
    """Whichever database it lies in, an author has signed what happened last."""
    ledger = open_ledger(var)
    author = admit(var, ledger, "author@test")
    append(ledger, author, "begun")
    return ledger


def append(ledger, who, fact):
    with ledger.writing() as writer:
        return writer.append("incident", "nodes", {"fact": fact, "score": 0.30000000000000004}, who)


def verify(ledger):
    return verify_ledger(ledger._engine)


class Child:
    """A process that opens the ledger and runs a few lines with it."""

    def __init__(self, var, lines):
        head = "import resource, sys\nfrom pathlib import Path\nfrom registry.ledger import open_ledger\n"
        code = f"{head}ledger = open_ledger(Path({str(var)!r}))\n{lines}"
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def hear(self):
        return self.process.stdout.readline().strip()


def test_a_writer_waits_two_seconds_for_another_one_and_is_told(ledger, var):
    with Child(var, "with ledger.writing():\n  print('held', flush=True)\n  sys.stdin.read()") as other:
        assert other.hear() == "held"
        begun = time.monotonic()
        with pytest.raises(Conflict, match=r"another writer has held it.*Nothing was changed; try again"):
            append(ledger, "service", "too late")
        assert 1.8 < time.monotonic() - begun < 10
        assert verify(ledger) == 2
    append(ledger, "service", "the other one was killed")
    assert verify(ledger) == 3


FILL = """
fact, written = 'x' * 20_000, 0
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
try:
    while written < 100:
        ledger.record_incident(fact, 'nodes', {})
        written += 1
except Exception as error:
    print(type(error).__name__, error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.record_incident('there is room again', 'nodes', {})
print(written, flush=True)
"""


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_full_disk_is_told_loses_nothing_and_the_ledger_goes_on(ledger, var):
    with Child(var, FILL) as child:
        assert re.match(r"RegistryError The ledger's database refuses: (disk|database).*room", child.hear())
        written = int(child.hear())
    assert 3 < written < 100
    assert verify(ledger) == 2 + written + 1
    assert ledger.events()[-1].body["fact"] == "there is room again"


def test_a_clock_that_goes_back_an_hour_changes_no_order(ledger, monkeypatch):
    class Earlier(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) - timedelta(hours=1)

    with monkeypatch.context() as patch:
        patch.setattr("registry.ledger.datetime", Earlier)
        append(ledger, "service", "an hour ago")
    append(ledger, "service", "now")
    assert verify(ledger) == 4
    facts = [event.body.get("fact") for event in ledger.events()]
    assert facts == [None, "begun", "an hour ago", "now"]
    times = [event.at for event in ledger.events()]
    assert times[2] < times[0] <= times[1] <= times[3]


def write_often(var, number):
    """One of the writers at once; whoever is told to try again does."""
    ledger = open_ledger(var)
    (var / f"ready-{number}").touch()
    while len(list(var.glob("ready-*"))) < WRITERS:
        time.sleep(0.01)
    for count in range(EACH):
        while True:
            try:
                append(ledger, f"writer-{number}", str(count))
                break
            except Conflict:
                continue


def test_eight_writers_at_once_all_append_in_order(ledger, var):
    var.mkdir(exist_ok=True)
    with ProcessPoolExecutor(WRITERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(write_often, [var] * WRITERS, range(WRITERS)))
    assert verify(ledger) == 2 + WRITERS * EACH
    for number in range(WRITERS):
        own = [event.body["fact"] for event in ledger.events() if event.actor == f"writer-{number}"]
        assert own == [str(count) for count in range(EACH)]


def overwrite(var, statement, *values):
    """Change the database behind the platform's back, its triggers removed; the first row of the answer."""
    with sqlite3.connect(var / "formulary.db") as database:
        for verb in ("update", "delete"):
            database.execute(f"DROP TRIGGER IF EXISTS events_no_{verb}")
        return database.execute(statement, values).fetchone()


def flip(raw, generator):
    """The same bytes but for one bit."""
    place = generator.randrange(len(raw))
    return raw[:place] + bytes([raw[place] ^ 1 << generator.randrange(8)]) + raw[place + 1 :]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_flipped_bit_in_any_record_is_named(ledger, var):
    author = admit(var, ledger, "author@test")
    for number in range(6):
        append(ledger, author, f"fact {number}, sí")
    generator, named = random.Random(4), 0
    while named < FLIPS:
        seq, column = generator.randint(1, 8), generator.choice(COLUMNS)
        if (seq, column) == (1, "task"):
            continue  # trust in a key is of no task: there is no bit
        whole = overwrite(var, f"SELECT CAST({column} AS BLOB) FROM events WHERE seq = {seq}")[0]
        change = f"UPDATE events SET {column} = CAST(? AS TEXT) WHERE seq = {seq}"
        overwrite(var, change, flip(whole, generator))
        with pytest.raises(TrustError, match=rf"^Ledger record {seq} "):
            verify(ledger)
        named += 1
        overwrite(var, change, whole)
    assert named == FLIPS
    assert verify(ledger) == 8


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_the_first_of_several_bad_records_is_named_by_many_processes_too(ledger, var, monkeypatch):
    monkeypatch.setattr(audit, "ROWS", 3)
    for number in range(8):
        append(ledger, "service", str(number))
    assert verify(ledger) == 10
    for change, first in (
        ("body = 'no JSON' WHERE seq IN (5, 8)", 5),
        ("kind = 'approved' WHERE seq = 4", 4),
    ):
        overwrite(var, f"UPDATE events SET {change}")
        with pytest.raises(TrustError, match=f"record {first} "):
            verify(ledger)
    overwrite(var, "DELETE FROM events WHERE seq = 3")
    with pytest.raises(TrustError, match="record 3 was changed or taken out"):
        verify(ledger)
    overwrite(var, "UPDATE events SET body = '{}' WHERE seq = 1")
    with pytest.raises(TrustError, match="record 1 "):
        verify(ledger)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_tail_that_was_cut_off_is_missed_where_the_head_is_kept(ledger, var):
    head = var / "ledger-head.json"
    assert check_head(head, ledger._engine) == 2  # each commit exports it
    append(ledger, "service", "the last one")
    write_head(head, ledger.events()[0], ledger._engine)  # a slower process comes late
    assert check_head(head, ledger._engine) == 3
    overwrite(var, "DELETE FROM events WHERE seq >= 3")
    assert verify(ledger) == 2  # a shorter chain holds
    with pytest.raises(TrustError, match=r"ends at record 2"):
        ledger.verify()
    with pytest.raises(TrustError, match=r"ends at record 2; ledger-head\.json knows record 3"):
        check_head(head, ledger._engine)
    for fact in ("another past", "and longer than the old one"):
        ledger.record_incident(fact, "nodes", {})  # needs no key
        with pytest.raises(TrustError, match="record 3 is not the one"):
            ledger.verify()
    with pytest.raises(TrustError, match="record 3 is not the one"):
        write_head(head, ledger.events()[-1], ledger._engine)
    assert json.loads(head.read_text())["seq"] == 3


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package that was really trained and exported, and its ledger."""
    places = write_root(tmp_path_factory.mktemp("flips"), nodes=Kind.CLASSIFICATION)
    version = train(places, "nodes")
    ledger = open_ledger(places.var)
    return shelf(places.var, ledger.version("nodes", version)[0]), ledger


def test_a_flipped_bit_anywhere_in_a_package_or_its_statements_is_refused(package):
    folder, ledger = package
    files = [path for where in (folder, statements_folder(folder)) for path in sorted(where.iterdir())]
    sizes = [path.stat().st_size for path in files]
    generator, refused = random.Random(4), 0
    for path in generator.choices(files, sizes, k=FLIPS):
        whole = path.read_bytes()
        path.write_bytes(flip(whole, generator))
        with pytest.raises(TrustError):
            verify_package(folder, ledger)
        refused += 1
        path.write_bytes(whole)
    assert refused == FLIPS
    verify_package(folder, ledger)
