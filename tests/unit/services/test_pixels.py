"""Pixels are kept where sites.yaml says so, under the key of the site, on time, and nobody waits."""

import os
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from imaging.config import Places, read_sites
from imaging.errors import ConfigError, TrustError, UnknownSite
from imaging.vocabulary import Kind
from monitoring import telemetry
from services import pixels as module
from services.console.viewer import draw_boxes, shrink
from services.findings import Found
from services.pixels import KeptPixels
from services.vault import Held, erase, find_pixels, forget, make_room, seal
from tests.tiny import promise

BODY = b"a slice of somebody" * 50
KIND = "application/dicom"


def write_sites(places, **days):
    sites = {name: {"kind": "internal", "title": name, "keep_days": kept} for name, kept in days.items()}
    (places.root / "sites.yaml").write_text(yaml.safe_dump({"sites": sites}))


@pytest.fixture
def places(tmp_path):
    made = Places(root=tmp_path, build=tmp_path / "build", var=tmp_path / "var")
    write_sites(made, north=2, east=2, south=0)
    return made


@pytest.fixture
def store(places):
    made = KeptPixels(places)
    made.start()
    yield made
    made.stop()


def answer(store, site="north", body=BODY, number=None):
    """A request that was answered: its body came, and its row is durable."""
    case = SimpleNamespace(asked=("nodes", site, "r"), held=None, row=None)
    store.hold(case, KIND, body)
    case.row = SimpleNamespace(id=number or str(uuid.uuid4()))
    store.keep(case)
    return case.row.id


def files(places):
    return sorted(path for path in (places.var / "pixels").rglob("*") if path.is_file())


def day(days_ago=0):
    return (datetime.now(UTC).date() - timedelta(days=days_ago)).isoformat()


def plant(places, site, days_ago, size=10):
    """A file of an earlier day."""
    folder = places.var / "pixels" / site / day(days_ago)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(uuid.uuid4())).write_bytes(bytes(size))
    return folder


def dropped(site):
    return telemetry.PIXELS_DROPPED.labels(site)._value.get()


def test_what_was_sent_is_read_back_byte_for_byte(places, store):
    number = answer(store)
    store.stop()
    assert find_pixels(places, "north", number) == Held("north", KIND, BODY)
    (path,) = files(places)
    assert path.relative_to(places.var / "pixels") == Path("north") / day() / number
    assert path.stat().st_mode & 0o077 == 0
    assert BODY[:19] not in path.read_bytes()


def test_the_file_is_plain_aes_gcm_under_the_sites_key_and_the_predictions_id(places, store):
    number = answer(store)
    store.stop()
    key = places.var / "keys" / "pixels-north.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32
    sealed = files(places)[0].read_bytes()
    opened = AESGCM(key.read_bytes()).decrypt(sealed[:12], sealed[12:], number.encode())
    assert opened == KIND.encode() + b"\n" + BODY


def test_another_sites_key_and_another_id_open_nothing(places, store):
    number, other = answer(store), answer(store, "east")
    store.stop()
    keys = places.var / "keys"
    assert (keys / "pixels-north.key").read_bytes() != (keys / "pixels-east.key").read_bytes()
    path = places.var / "pixels" / "north" / day()
    (path / number).rename(path / other)
    with pytest.raises(TrustError, match="do not decrypt"):
        find_pixels(places, "north", other)
    (keys / "pixels-north.key").write_bytes((keys / "pixels-east.key").read_bytes())
    (path / other).rename(path / number)
    with pytest.raises(TrustError, match="do not decrypt"):
        find_pixels(places, "north", number)


def test_a_file_that_was_cut_or_changed_is_not_shown(places, store):
    number = answer(store)
    store.stop()
    (path,) = files(places)
    sealed = path.read_bytes()
    for damaged in (sealed[:-1], sealed[:5], b"", sealed[:-1] + bytes([sealed[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(TrustError):
            find_pixels(places, "north", number)


def test_a_site_that_keeps_no_pixels_keeps_none(places, store):
    number = answer(store, "south")
    store.stop()
    assert files(places) == []
    assert not (places.var / "keys" / "pixels-south.key").exists()
    assert find_pixels(places, "south", number) is None


def test_a_body_that_no_answer_came_of_is_let_go(places, store):
    case = SimpleNamespace(asked=("nodes", "north", "r"), held=None, row=None)
    store.hold(case, KIND, BODY)
    store.keep(case)  # there is no row
    assert case.held is not None
    store.release(case)
    store.release(case)
    store.release(None)
    store.stop()
    assert files(places) == []
    assert store._bytes == 0


def test_an_id_that_is_no_uuid_is_looked_for_nowhere(places, store):
    secret = places.var / "pixels" / "north" / day() / "secret"
    secret.parent.mkdir(parents=True)
    secret.write_bytes(b"x")
    for number in ("secret", "../secret", "", "..", str(uuid.uuid4()).upper(), f"{uuid.uuid4()}\n"):
        assert find_pixels(places, "north", number) is None


def test_days_are_erased_when_they_are_over_their_time_and_not_before(places):
    kept, last, over = plant(places, "north", 0), plant(places, "north", 2), plant(places, "north", 3)
    none = plant(places, "south", 0)
    gone = plant(places, "closed", 0)
    other = places.var / "pixels" / "north" / "not-a-day"
    other.mkdir()
    erase(places.var / "pixels", {"north": 2})
    assert kept.exists()
    assert last.exists()
    assert not over.exists()
    assert not none.exists()
    assert not gone.exists()
    assert other.exists()  # nobody's folder but ours


def test_starting_erases_and_so_does_a_lowered_number(places, monkeypatch):
    over, last = plant(places, "north", 3), plant(places, "north", 2)
    monkeypatch.setattr(module, "TIDY_S", 0.05)
    store = KeptPixels(places)
    store.start()
    wait(lambda: not over.exists())
    assert last.exists()
    write_sites(places, north=1)
    wait(lambda: not last.exists())
    (places.root / "sites.yaml").write_text("sites: {north: {kind: internal, title: t, keep_dayz: 1}}")
    kept = plant(places, "north", 1)
    time.sleep(0.2)
    assert kept.exists()  # what cannot be read changes nothing
    store.stop()
    assert kept.exists()


def test_stopping_erases_nothing(places, store, monkeypatch):
    monkeypatch.setattr(module, "TIDY_S", 0.0)
    answer(store)
    store.stop()
    assert len(files(places)) == 1


def test_a_slow_disk_holds_nobody_up_and_memory_is_bounded(places, store, monkeypatch):
    """The disk is blocked: answers go on, and beyond the bound of the queue their pixels are dropped."""
    free = threading.Event()
    monkeypatch.setattr(module, "write", lambda *_: free.wait(30))
    monkeypatch.setattr(module, "QUEUE_BYTES", 10 * len(BODY))
    before, began = dropped("north"), time.monotonic()
    for _ in range(500):
        answer(store)
    assert time.monotonic() - began < 2  # 500 answers, while not one file could be written
    assert not free.is_set()
    assert store._bytes == 10 * len(BODY)
    assert dropped("north") - before == 490
    free.set()
    store.stop()
    assert store._bytes == 0


def test_a_disk_that_fails_is_counted_and_the_thread_lives_on(places, store, monkeypatch, caplog):
    before, real = dropped("north"), module.write

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write", fail)
    answer(store)
    answer(store)
    wait(lambda: dropped("north") - before == 2)
    monkeypatch.setattr(module, "write", real)
    number = answer(store)
    store.stop()
    assert find_pixels(places, "north", number)
    assert sum("were not kept" in line for line in caplog.messages) == 1  # not a line for each
    assert "somebody" not in caplog.text


def test_the_oldest_days_make_room_first_and_that_is_told(places, caplog):
    oldest, older = plant(places, "east", 2, 100), plant(places, "north", 1, 100)
    today = plant(places, "north", 0, 100)
    assert make_room(places.var / "pixels", 250) == 200
    assert (oldest.exists(), older.exists(), today.exists()) == (False, True, True)
    assert f"east, {day(2)} were removed" in caplog.text
    assert make_room(places.var / "pixels", 50) == 100
    assert (older.exists(), today.exists()) == (False, True)
    assert "not kept any more today" in caplog.text


def test_a_full_day_keeps_what_it_has_and_drops_what_comes(places, monkeypatch):
    monkeypatch.setenv("FORMULARY_PIXELS_BYTES", "2500")
    store, before = KeptPixels(places), dropped("north")
    store.start()
    numbers = [answer(store) for _ in range(4)]  # each is 967 bytes and a little more
    store.stop()
    assert [bool(find_pixels(places, "north", number)) for number in numbers] == [True, True, False, False]
    assert dropped("north") - before == 2


def test_forgetting_removes_the_key_so_that_copies_cannot_be_read(places, store):
    number = answer(store)
    answer(store, "east")
    wait(lambda: len(files(places)) == 2)
    (path, copy) = (places.var / "pixels" / "north" / day() / number, places.root / "backup")
    copy.write_bytes(path.read_bytes())
    assert forget(places, "north") == 1
    assert [path.parts[-3] for path in files(places)] == ["east"]
    path.parent.mkdir(parents=True)
    copy.rename(path)
    with pytest.raises(TrustError, match="key of north's pixels is gone"):
        find_pixels(places, "north", number)
    again = answer(store)  # the site goes on, with a key of its own
    store.stop()
    assert find_pixels(places, "north", again).body == BODY
    with pytest.raises(TrustError, match="do not decrypt"):
        find_pixels(places, "north", number)


@pytest.mark.parametrize("site", ["..", ".", "", "nowhere", "north/../../keys"])
def test_only_a_site_can_be_forgotten(places, store, site):
    answer(store)
    store.stop()
    with pytest.raises(UnknownSite):
        forget(places, site)
    assert len(files(places)) == 1


def test_two_processes_make_one_key(places):
    held, sealed = Held("north", KIND, BODY), []
    makers = [threading.Thread(target=lambda: sealed.append(seal(places.var, held, "i"))) for _ in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    key = AESGCM((places.var / "keys" / "pixels-north.key").read_bytes())
    assert len(sealed) == 8
    assert {key.decrypt(one[:12], one[12:], b"i") for one in sealed} == {KIND.encode() + b"\n" + BODY}
    assert os.listdir(places.var / "keys") == ["pixels-north.key"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [([[0, 255]], "uint8"), ([[-1000, 3071]], "int16"), ([[0, 40000]], "uint16"), ([[0, 70000]], "float32"),
     ([[0.5, 2]], "float32"), ([[-1, 40000]], "float32")],
)  # fmt: skip
def test_pixels_are_sent_in_the_smallest_type_that_loses_nothing(values, kind):
    pixels = np.array(values, np.float32)
    packed = shrink(pixels)
    assert packed.dtype.name == kind
    assert np.array_equal(packed.astype(np.float64), pixels.astype(np.float64))


def test_lesions_are_outlined_by_their_boxes_also_at_the_edge():
    contract = promise(Kind.DETECTION, classes=("background", "lesion"), rows=8, columns=10)
    boxes = [
        {"row": 3, "column": 4, "height": 4, "width": 2},
        {"row": 7, "column": 9, "height": 4, "width": 4},
    ]
    drawn = draw_boxes(Found({"lesions": boxes}, {}), contract)
    assert ["".join(".#"[value] for value in row) for row in drawn] == [
        "..........",
        "...###....",
        "...#.#....",
        "...#.#....",
        "...#.#....",
        "...###.###",
        ".......#.#",
        ".......###",
    ]


@pytest.mark.parametrize("days", [-1, 366, "long"])
def test_a_number_of_days_that_makes_no_sense_is_refused(places, days):
    write_sites(places, north=days)
    with pytest.raises(ConfigError, match="keep_days"):
        read_sites(places)


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
