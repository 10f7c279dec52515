"""A pass counts every row once, whatever happens meanwhile, and judges what is new by itself."""

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from datetime import date, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from sqlalchemy import text

from imaging.config import Places, read_places
from imaging.errors import Conflict
from monitoring.estimating import _list_cases
from monitoring.journal import Prediction, open_journal
from monitoring.overview import read_overviews, read_streams
from monitoring.parquet import export_journal
from monitoring.records import Alarm, Assessment, Refusal, open_records
from monitoring.streams import MOST, unpack
from monitoring.watching import Watch, check_budgets
from registry.database import writing
from registry.surveillance import Surveillance

START = date(2026, 1, 5)
INSERT = text(
    "INSERT INTO predictions (id, at, request_id, task, site, version, package, engine, subject, image, "
    "columns, stages_ms, answer, batch, acquisition) VALUES (:id, :at, 'r', :task, :site, :version, "
    ":package, 'e', :subject, :image, :columns, :stages, '', '', :acquisition)"
)


class Hospital:
    """A journal that is filled as months would, without a gateway."""

    def __init__(self, var, unit="day"):
        self.var, self.records = var, open_records(var)
        self.journal, self.rng = open_journal(var), np.random.default_rng(1)
        root = var / "root"
        (root / "registry" / "policies").mkdir(parents=True)
        for name in ("params.yaml", "sites.yaml"):
            (root / name).write_text((read_places().root / name).read_text())
        for task in ("brain-tissue", "lung-nodule", "retinopathy", "histology"):
            policy = (read_places().root / "registry" / "policies" / f"{task}.yaml").read_text()
            kept = policy.split("\nsurveillance:")[0]
            told = f"{kept}\nsurveillance: {{unit: {unit}, per_day: 10, window: 50, window_days: 5}}\n"
            (root / "registry" / "policies" / f"{task}.yaml").write_text(told)
        self.places = Places(root=root, build=var / "build", var=var)
        self.watch = Watch(self.places, self.records.engine)

    def send(self, days, per_day=10, task="lung-nodule", site="north", change=None, **told):
        rows = []
        for day in range(*days):
            at = (START + timedelta(days=day)).isoformat()
            for number in range(per_day):
                values = {
                    "noise": self.rng.normal(1, 0.1),
                    "median": self.rng.normal(),
                    "probability": self.rng.uniform(),
                }
                values |= {f"e{axis}": self.rng.normal() for axis in range(3)}
                if change:
                    values |= change(values)
                rows.append({
                    "id": str(uuid.uuid4()), "at": f"{at}T{8 + number % 10:02d}:00:00.000+00:00",
                    "task": task, "site": site, "version": 1, "package": "", "subject": uuid.uuid4().hex,
                    "image": "1" * 64,
                    "columns": json.dumps(values), "stages": '{"engine": 2.0}', "acquisition": "{}", **told,
                })  # fmt: skip
        with writing(self.records.engine).begin() as connection:
            connection.execute(INSERT, rows)

    def look(self, day):
        return self.watch.look(START + timedelta(days=day))

    def count(self, query):
        with self.records.engine.connect() as connection:
            return connection.execute(text(query)).scalar_one()


@pytest.fixture
def hospital(tmp_path):
    return Hospital(tmp_path)


def test_every_row_is_counted_once(hospital):
    hospital.send((0, 3))
    assert hospital.look(3).rows == 30
    assert hospital.look(3).rows == 0
    hospital.send((3, 4), site="east")
    hospital.send((3, 4))
    done = hospital.look(4)
    assert (done.rows, done.places) == (20, 2)
    assert (
        hospital.count("SELECT SUM(rows) FROM streams")
        == hospital.count("SELECT COUNT(*) FROM predictions")
        == 50
    )


def test_a_subject_that_comes_twice_has_one_value_and_so_has_an_image_of_nobody(hospital):
    hospital.send((0, 1), per_day=4, subject="a" * 64)
    hospital.send((0, 1), per_day=3, subject=None)
    hospital.look(1)
    told = read_overviews(hospital.var)[("lung-nodule", "north")]
    assert (told.rows, told.subjects) == (7, 2)


def test_passes_one_by_one_find_what_one_pass_finds(hospital, tmp_path):
    """The same rows in the same order, in 60 passes and in one: the same streams to the last digit."""

    def move(values):
        return {"noise": values["noise"] + 0.15}

    hospital.send((0, 40))
    hospital.send((40, 60), change=move)
    other = Hospital(tmp_path / "other")
    with hospital.records.engine.connect() as connection:
        rows = [
            dict(row) for row in connection.execute(text("SELECT * FROM predictions ORDER BY seq")).mappings()
        ]
    for day in range(60):
        of_day = [row for row in rows if row["at"][:10] == (START + timedelta(days=day)).isoformat()]
        with writing(other.records.engine).begin() as connection:
            connection.execute(INSERT, [{**row, "stages": row["stages_ms"]} for row in of_day])
        other.look(day + 1)
    hospital.look(60)
    found = [
        [(one.statistic, one.direction, one.since, round(one.value, 6)) for one in place.records.read(Alarm)]
        for place in (hospital, other)
    ]
    assert found[0] == found[1]
    assert [one[:2] for one in found[0]] == [("noise", "up")]


def test_a_shift_is_found_and_dated(hospital):
    hospital.send((0, 40))
    assert hospital.look(40).alarms == []
    hospital.send((40, 60), change=lambda values: {"noise": values["noise"] + 0.2})
    alarms = hospital.look(60).alarms
    assert {one.statistic for one in alarms} == {"noise"}
    (first, *_) = alarms
    assert (first.kind, first.part, first.direction, first.budget_days) == ("chart", "pixels", "up", 180)
    assert abs((date.fromisoformat(first.since) - START).days - 40) <= 2
    told = read_overviews(hospital.var)[("lung-nodule", "north")].combined["parts"]
    assert told["pixels"]["value"] >= 1 > told["scores"]["value"]
    assert re.match(r"noise went up from (1|0\.99).* to 1\.[12]", first.detail)


def test_a_window_of_other_embeddings_alarms_against_the_first_one(hospital):
    hospital.send((0, 10))
    assert hospital.look(10).alarms == []
    hospital.send((10, 16), change=lambda values: {f"e{axis}": values[f"e{axis}"] + 2 for axis in range(3)})
    alarms = hospital.look(16).alarms
    assert [(one.kind, one.statistic) for one in alarms][:1] == [("window", "embedding")]
    assert alarms[0].value <= alarms[0].bound


def test_a_new_scanner_is_seen_though_nothing_else_changes(hospital):
    hospital.send((0, 30), acquisition='{"make": "A", "model": "One"}')
    hospital.look(30)
    hospital.send((30, 50), acquisition='{"make": "B", "model": "Two"}')
    assert [one.statistic for one in hospital.look(50).alarms][:1] == ["scanner"]


def read_place(hospital):
    """What is kept of version 1 at north."""
    with hospital.records.engine.connect() as connection:
        query = text("SELECT * FROM streams WHERE site = 'north' AND version = 1")
        return unpack(dict(connection.execute(query).mappings().one()))


def test_what_a_scanner_says_does_not_change_while_nothing_does(hospital):
    """The first hundred subjects tell what is usual; a share that runs would go somewhere by itself."""
    for make in "AABABAAAAB":
        hospital.send((0, 1), acquisition=json.dumps({"make": make}))
    for make in "BABC":
        hospital.send((1, 2), per_day=40, acquisition=json.dumps({"make": make}))
    hospital.look(2)
    told = read_place(hospital).cases.column("scanner")
    assert np.isnan(told[:100]).all()
    expected = [np.log(101 / (usual + 1)) for usual in (30, 70, 30, 0)]
    assert told[100:] == pytest.approx(np.repeat(expected, 40))


@pytest.mark.parametrize(
    ("unit", "window", "a_day", "told"),
    [("day", 50, 20, (5, 100)), ("day", 50, 300, (5, 100)), ("subject", 1400, 300, (4, 1400))],
)
def test_windows_are_of_whole_days_and_fill_at_any_volume(tmp_path, unit, window, a_day, told):
    def move(values):
        return {f"e{axis}": values[f"e{axis}"] + 1 for axis in range(3)}

    hospital = Hospital(tmp_path, unit)
    path = hospital.places.policies / "lung-nodule.yaml"
    path.write_text(path.read_text().replace("window: 50", f"window: {window}"))
    for day in range(10):
        hospital.send((day, day + 1), a_day, change=move if day >= 5 else None)
        hospital.look(day + 1)
    (since,) = (one.since for one in hospital.records.read(Alarm) if one.kind == "window")
    window = read_place(hospital).window
    assert ((date.fromisoformat(since) - START).days, window["subjects"]) == told


def test_a_day_stands_once_whatever_comes_late(hospital):
    hospital.send((0, 12))
    hospital.send((14, 20))
    hospital.look(20)
    for late in ((10, 11), (9, 13), (12, 13), (16, 19)):
        hospital.send(late, per_day=1)
        hospital.look(20)
    hospital.send((20, 21))
    hospital.look(21)
    kept = read_place(hospital)
    told = (kept.daily.days, kept.cases.days[180:], kept.opened_days[:1])
    daily, late, opened = ((days - START.toordinal()).tolist() for days in told)
    assert daily == [*range(12), *range(14, 20), 12, 20]
    assert late == [*[20] * 5, 12, *[20] * 13]
    assert opened == [17]  # no window begins before the last one ended


def test_streams_as_they_were_kept_before_go_on(hospital):
    """Without an open window, and with the labels of all subjects."""
    hospital.send((0, 23), acquisition='{"make": "A"}')
    hospital.look(23)
    with writing(hospital.records.engine).begin() as connection:
        row = connection.execute(text("SELECT state, history FROM streams")).mappings().one()
        state = json.loads(row["state"]) | {"tested": 200, "labels": {"A": 150, "B": 30, "other": 50}}
        count, width = state.pop("opened")
        told = {"state": json.dumps(state), "history": row["history"][: -4 * count * (1 + width)]}
        connection.execute(text("UPDATE streams SET state = :state, history = :history"), told)
    hospital.send((23, 24), acquisition='{"make": "B"}')
    assert hospital.look(24).rows == 10
    told = read_place(hospital)
    assert told.cases.column("scanner")[-10:] == pytest.approx(np.log(231 / 31))
    assert (len(told.opened), count) == (40, 30)


def test_a_site_whose_images_are_all_refused_is_not_silent(hospital):
    hospital.send((0, 30))
    hospital.look(30)
    for day in range(30, 50):
        at = (START + timedelta(days=day)).isoformat() + "T10:00:00.000+00:00"
        hospital.records.append(
            [Refusal(at=at, task="lung-nodule", site="north", reason="wrong-shape", count=9)]
        )
    hospital.watch = Watch(hospital.places, hospital.records.engine)
    assert "refusals" in {one.statistic for one in hospital.look(50).alarms}


def test_a_small_site_has_not_enough_cases_and_no_alarm(hospital):
    """Two cases a week in six weeks: a chart says nothing before `least` days."""
    for week in range(6):
        hospital.send((7 * week, 7 * week + 2), per_day=1, change=lambda _, week=week: {"noise": 1.0 + week})
    assert hospital.look(42).alarms == []
    told = read_overviews(hospital.var)[("lung-nodule", "north")]
    assert told.combined["enough"] is False
    assert told.combined["parts"]["refusals"]["value"] == 0
    streams = read_streams(hospital.places, "lung-nodule", "north", 1)
    assert not any(stream.enough for stream in streams)


def test_a_long_journal_is_taken_in_parts_and_only_the_newest_is_kept(hospital):
    hospital.send((0, 120), per_day=2 * MOST // 100)
    done = hospital.look(120)
    assert done.rows == 120 * 2 * MOST // 100 > 2 * MOST
    (noise,) = (
        one for one in read_streams(hospital.places, "lung-nodule", "north", 1) if one.name == "noise"
    )
    assert len(noise.values) == 120


def test_gaps_and_days_without_a_case_are_no_values(hospital):
    hospital.send((0, 5))
    hospital.send((90, 95))
    hospital.look(95)
    (noise,) = (
        one for one in read_streams(hospital.places, "lung-nodule", "north", 1) if one.name == "noise"
    )
    assert len(noise.values) == 10


def test_the_same_subjects_on_one_day_are_charts_of_subjects_where_the_policy_says_so(tmp_path):
    hospital = Hospital(tmp_path, unit="subject")
    hospital.send((0, 1), per_day=100)
    hospital.send((0, 1), per_day=40, change=lambda values: {"noise": values["noise"] + 0.3})
    alarms = hospital.look(0).alarms
    assert "noise" in {one.statistic for one in alarms}
    since = next(one.since for one in alarms if one.statistic == "noise")
    assert 95 <= int(since.split()[1].rstrip(",")) <= 106


KILLED = """
import sys, os
from pathlib import Path
from monitoring.records import open_records
from monitoring.watching import Watch, check_budgets
from monitoring import watching
from imaging.config import Places
var = Path(sys.argv[1]); places = Places(root=var / "root", build=var / "build", var=var)
watching.BATCH = 1
print("ready", flush=True)
Watch(places, open_records(var).engine).look()
"""


def test_after_kill_nine_the_counts_are_the_journals(hospital):
    """Killed where chance wills, some places done and others not; the next pass counts the rest."""
    for number in range(30):
        hospital.send((0, 4), site=f"s{number}")
    for wait_s in (0.05, 0.15, 0.3, 0.6):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(hospital.var)], stdout=subprocess.PIPE)
        child.stdout.readline()
        try:
            child.wait(wait_s)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
    hospital.look(4)
    with hospital.records.engine.connect() as connection:
        told = dict(connection.execute(text("SELECT site, rows FROM streams")).fetchall())
        journal = dict(
            connection.execute(text("SELECT site, COUNT(*) FROM predictions GROUP BY site")).fetchall()
        )
    assert told == journal


def test_the_journal_is_exported_as_it_stands(hospital, tmp_path):
    import pandas as pd

    hospital.send((0, 2), acquisition='{"make": "A"}')
    hospital.journal.append([Prediction(str(uuid.uuid4()), "r", "lung-nodule", "east", 2, "p", "e", None, "i",
                                        {"other": 1.0}, {"decode": 3.0})])  # fmt: skip
    assert export_journal(hospital.var, tmp_path / "j.parquet") == 21
    table = pd.read_parquet(tmp_path / "j.parquet")
    assert (len(table), table["acquired_make"].nunique(), table["other"].notna().sum()) == (21, 1, 1)
    assert table["ms_engine"].iloc[0] == 2.0
    assert export_journal(hospital.var, tmp_path / "k.parquet", site="east") == 1


def test_a_second_monitor_is_told_and_writes_nothing(hospital):
    """Both read a place whose day is over; the first writes, the second must not raise the same alarms."""
    hospital.send((0, 40))
    hospital.send((40, 46), change=lambda values: {"noise": values["noise"] + 0.5})
    hospital.look(41)
    second = Watch(hospital.places, hospital.records.engine)
    write = second._write

    def first_the_other(*told):
        hospital.look(46)
        write(*told)

    second._write = first_the_other
    with pytest.raises(Conflict, match="Another monitor"):
        second.look(START + timedelta(days=46))
    told = [(one.statistic, one.since) for one in hospital.records.read(Alarm)]
    assert told
    assert len(told) == len(set(told))


@pytest.mark.parametrize(
    "broken",
    [
        {"package": "sha256:gone", "columns": "[1]"},
        {"subject": None, "image": "", "at": "yesterday"},
        {"columns": "{"},
    ],
)
def test_what_fails_at_one_site_stops_no_other_and_is_tried_again(hospital, caplog, broken):
    hospital.send((0, 40))
    hospital.look(40)
    hospital.send((40, 41), site="bad", **broken)
    hospital.send((40, 60), change=lambda values: {"noise": values["noise"] + 0.3})
    alarms = hospital.look(60).alarms
    assert {(one.site, one.statistic) for one in alarms} == {("north", "noise")}
    assert "lung-nodule v1 at bad could not be judged" in caplog.text
    caplog.clear()
    hospital.look(60)
    assert "lung-nodule v1 at bad could not be judged" in caplog.text


def test_a_row_with_odd_values_is_counted_and_judged_by_the_rest(hospital):
    hospital.send((0, 30), subject=None, image="not hexadecimal")
    hospital.send(
        (0, 30), per_day=3, change=lambda _: {"e1": None, "noise": "loud"}, acquisition='{"make": 3}'
    )
    hospital.look(30)
    told = read_overviews(hospital.var)[("lung-nodule", "north")]
    assert (told.rows, told.subjects) == (390, 91)


def test_a_policy_that_cannot_be_read_leaves_the_last_one(hospital, caplog):
    hospital.send((0, 40))
    hospital.look(40)
    (hospital.places.policies / "lung-nodule.yaml").write_text("task: [")
    hospital.send((40, 60), change=lambda values: {"noise": values["noise"] + 0.3})
    assert "noise" in {one.statistic for one in hospital.look(60).alarms}
    assert "The last one that could be read holds" in caplog.text


def test_months_that_are_fed_in_steps_are_days_as_they_were(hospital):
    """Passes by the real clock over rows of last winter: no day is over before a later one is seen."""

    def move(values):
        return {"noise": values["noise"] + 0.3}

    for start in range(0, 60, 10):
        hospital.send((start, start + 10), change=move if start >= 40 else None)
        hospital.watch.look()
    (noise,) = (
        one for one in read_streams(hospital.places, "lung-nodule", "north", 1) if one.name == "noise"
    )
    assert len(noise.values) == 59  # the last is not over
    (first, *_) = hospital.records.read(Alarm)
    assert (first.statistic, first.since) == ("noise", (START + timedelta(days=40)).isoformat())


def test_a_clock_that_was_ahead_blinds_nobody(hospital):
    """One pass with a clock ten years ahead; rows go on as before, and so do days and charts."""
    hospital.send((0, 40))
    hospital.look(3650)
    for start in range(40, 60, 5):
        hospital.send((start, start + 5), change=lambda values: {"noise": values["noise"] + 0.5})
        hospital.look(start + 5)
    assert "noise" in {one.statistic for one in hospital.records.read(Alarm)}


def test_another_unit_in_the_policy_leaves_no_chart_of_the_old_one(hospital):
    hospital.send((0, 20))
    path = hospital.places.policies / "lung-nodule.yaml"
    path.write_text(path.read_text().replace("unit: day", "unit: subject"))
    hospital.look(20)
    assert {one.unit for one in read_streams(hospital.places, "lung-nodule", "north", 1)} == {
        "subject",
        "day",
    }
    path.write_text(path.read_text().replace("unit: subject", "unit: day"))
    hospital.send((20, 40))
    assert hospital.look(40).alarms == []
    told = read_streams(hospital.places, "lung-nodule", "north", 1)
    assert {one.unit for one in told} == {"day"}
    assert len(told) == len({one.name for one in told})


def test_windows_that_go_on_being_others_are_one_event_and_rows_without_embedding_hide_none(hospital):
    hospital.send((0, 6))
    hospital.look(6)
    shift = {f"e{axis}": 3 for axis in range(3)}
    for start in range(6, 36, 6):
        hospital.send(
            (start, start + 6), change=lambda values: {name: values[name] + by for name, by in shift.items()}
        )
        hospital.send((start, start + 1), per_day=1, columns='{"noise": 1.0}')
    alarms = hospital.look(36).alarms
    assert [one.kind for one in alarms if one.kind == "window"] == ["window"]


def test_a_task_that_nobody_knows_is_counted_and_left_alone(hospital):
    hospital.send((0, 3), task="unknown")
    assert hospital.look(3).rows == 30
    assert hospital.look(3).places == 0


def test_labels_that_come_one_by_one_are_estimated_once_a_minute_and_none_is_forgotten(hospital, monkeypatch):
    """Of the version that answers: a label of the one before does not hide its estimate."""
    from monitoring.estimating import Estimator

    calls = []
    monkeypatch.setattr(Estimator, "_open", lambda self, digest: (None, {}))
    monkeypatch.setattr(
        "monitoring.estimating.estimate_place", lambda *told: calls.append(1) or {"n": len(calls)}
    )
    hospital.send((0, 3), package="sha256:1")
    hospital.look(3)
    assert len(calls) == 1
    with hospital.records.engine.connect() as connection:
        ids = connection.execute(text("SELECT id FROM predictions")).scalars().all()
    for number in ids[:5]:
        hospital.records.append([Assessment(task="lung-nodule", site="north", prediction=number, version=1,
                                            source="csv", verdict="labelled", truth=1)])  # fmt: skip
        hospital.look(3)
    assert len(calls) == 1
    monkeypatch.setattr("monitoring.estimating.AGAIN_S", 0)
    assert len(hospital.look(3).estimates) == 1
    assert hospital.look(3).estimates == []


def test_refusals_are_of_the_version_that_answered_most_and_of_all_answers(hospital):
    """A canary answers some of a site's studies: its few answers do not make the site's refusals many."""
    for day in range(3):
        hospital.send((day, day + 1), per_day=19)
        hospital.send((day, day + 1), per_day=1, version=2)
        at = f"{(START + timedelta(days=day)).isoformat()}T09:00:00.000+00:00"
        hospital.records.append(
            [Refusal(task="lung-nodule", site="north", reason="unreadable", count=5, at=at)]
        )
    hospital.look(3)
    told = {one.version: one for one in read_all(hospital, "refusals")}
    assert told[1].values.tolist() == pytest.approx([5 / 25] * 3)
    assert 2 not in told or not np.isfinite(told[2].values).any()


def read_all(hospital, name):
    """A stream of both versions at north, where they have it."""
    for version in (1, 2):
        for one in read_streams(hospital.places, "lung-nodule", "north", version):
            if one.name == name:
                yield SimpleNamespace(version=version, values=one.values)


def test_a_backlog_of_two_versions_keeps_what_readers_said_of_either(hospital):
    hospital.send((0, 30), per_day=60)
    hospital.send((40, 70), per_day=60, version=2)
    query = text("SELECT id, at FROM predictions WHERE version = 1 AND at > :from ORDER BY seq")
    with hospital.records.engine.connect() as connection:
        rows = connection.execute(query, {"from": (START + timedelta(days=20)).isoformat()}).all()[::10]
    hospital.records.append([Assessment(task="lung-nodule", site="north", prediction=key, version=1, at=at,
                                        source="http", verdict="rejected") for key, at in rows])  # fmt: skip
    hospital.look(80)
    (told,) = [one for one in read_all(hospital, "discordance") if one.version == 1]
    assert np.isfinite(told.values).sum() == 10


def test_what_failed_is_tried_again_by_the_next_process_too(hospital, monkeypatch):
    def fail(*_):
        raise OSError("the package is gone")

    hospital.send((0, 1))
    hospital.send((0, 1), site="east", package="sha256:x")
    monkeypatch.setattr("monitoring.watching.read_axes", fail)
    assert hospital.look(1).rows == 10
    monkeypatch.setattr("monitoring.watching.read_axes", lambda *_: None)
    other = Watch(hospital.places, hospital.records.engine)
    assert [other.look(START + timedelta(days=day)).rows for day in (1, 2)] == [10, 0]


def test_nothing_that_waits_is_forgotten_where_it_cannot_be_written(hospital, monkeypatch):
    hospital.send((0, 1))
    monkeypatch.setattr("monitoring.watching.Streams.take", lambda *_: 1 / 0)
    assert hospital.look(1).rows == 0
    monkeypatch.undo()
    monkeypatch.setattr(Watch, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hospital.look(1)
    monkeypatch.undo()
    assert hospital.look(1).rows == 10


def test_policies_that_promise_a_site_more_than_its_tasks_together_keep_are_told(hospital, caplog):
    four = {str(number): Surveillance(budget_days=180, tasks=4) for number in range(4)}
    assert check_budgets(four) == check_budgets({}) == ""
    told = check_budgets(four | {"imported": Surveillance(budget_days=180)})
    assert "all 5 tasks may alarm falsely once in 90 days" in told
    hospital.send((0, 2))
    for day in (1, 2):
        hospital.look(day)
    assert caplog.text.count("all 4 tasks may alarm falsely once in 45 days") == 1  # and not at each pass


def test_what_serves_is_shown_whatever_a_canary_answers_beside_it(hospital):
    hospital.send((0, 2))
    hospital.send((1, 2), per_day=3, version=2)
    hospital.look(2)
    place = ("lung-nodule", "north")
    for serving, version in (({place: 1}, 1), ({place: 2}, 2), ({}, 2), ({place: 3}, 2)):
        assert read_overviews(hospital.var, serving)[place].version == version


def test_after_a_restart_a_policy_that_cannot_be_read_holds_its_rows_back_and_the_pass_is_not_told(
    hospital, caplog
):
    hospital.send((0, 40))
    hospital.look(40)
    path = hospital.places.policies / "lung-nodule.yaml"
    kept = path.read_text()
    path.write_text("task: [")
    hospital.watch = Watch(hospital.places, hospital.records.engine)
    with writing(hospital.records.engine).begin() as connection:
        connection.execute(text("UPDATE cursors SET seq = 7 WHERE name = 'looked'"))
    hospital.send((40, 60), change=lambda values: {"noise": values["noise"] + 0.3})
    hospital.send((40, 41), task="histology")
    assert hospital.look(60).rows == 10  # another task goes on
    assert "lung-nodule v1 at north could not be judged" in caplog.text
    assert hospital.count("SELECT seq FROM cursors WHERE name = 'looked'") == 7  # its age goes on growing
    hospital.watch = Watch(hospital.places, hospital.records.engine)
    path.write_text(kept)
    done = hospital.look(60)
    assert (done.rows, "noise" in {one.statistic for one in done.alarms}) == (200, True)
    assert hospital.count("SELECT seq FROM cursors WHERE name = 'looked'") > 7


def test_each_answer_keeps_the_threshold_that_it_was_given_by(hospital):
    """A profile is stored after 30 answers: these were not given by its threshold."""
    profile = {"raw_probability": 0.5, "threshold": 0.25, "abstained": 0.0}
    hospital.send((0, 3))
    hospital.send((3, 5), change=lambda values: profile | {"probability": 0.3})
    hospital.look(5)
    cases = _list_cases(read_place(hospital))
    assert [row.get("threshold") for row in cases] == [None] * 30 + [0.25] * 20
    assert [row["probability"] for row in cases[30:]] == pytest.approx([0.3] * 20)
    assert [row["raw_probability"] for row in cases[30:]] == [0.5] * 20


def test_an_archive_that_is_sent_again_is_counted_and_has_no_second_value(hospital):
    """Of the oldest subjects nobody knows any more whether they had one."""
    hospital.send((0, 30), per_day=50)
    hospital.look(30)
    again = ("at, request_id, task, site, version, package, engine, subject, image, columns, stages_ms, "
             "answer, batch, acquisition")  # fmt: skip
    with writing(hospital.records.engine).begin() as connection:
        query = f"INSERT INTO predictions (id, {again}) SELECT 'again' || id, {again} FROM predictions"
        connection.execute(text(query))
    hospital.send((30, 31))
    hospital.look(31)
    told = read_place(hospital)
    assert (told.rows, told.subjects, len(told.daily.days)) == (3010, 1510, 31)
    hospital.send((31, 32))  # late days of a clock that goes on are values as before
    hospital.look(32)
    assert read_place(hospital).subjects == 1520


def test_an_answer_that_abstained_misses_no_truth(hospital):
    hospital.send((0, 2), change=lambda values: {"probability": 0.2, "threshold": 0.5, "abstained": 1.0})
    with hospital.records.engine.connect() as connection:
        rows = connection.execute(text("SELECT id, at FROM predictions")).all()
    hospital.records.append([Assessment(task="lung-nodule", site="north", prediction=key, version=1, truth=1,
                                        at=at, source="csv", verdict="labelled")
                             for key, at in rows])  # fmt: skip
    hospital.look(3)
    (told,) = [one for one in read_all(hospital, "discordance") if one.version == 1]
    assert told.values.tolist() == [0.0, 0.0]
    assert not [one for one in read_all(hospital, "error") if np.isfinite(one.values).any()]


def test_labels_that_wait_are_found_by_the_next_process_too(hospital):
    hospital.send((0, 3))
    hospital.look(3)
    with hospital.records.engine.connect() as connection:
        found = connection.execute(text("SELECT id, at FROM predictions")).first()
    hospital.records.append([Assessment(task="lung-nodule", site="north", prediction=found[0], version=1,
                                        at=found[1], source="csv", verdict="labelled", truth=1)])  # fmt: skip
    with writing(hospital.records.engine).begin() as connection:  # as if a pass had seen them, and they wait
        connection.execute(text("INSERT OR REPLACE INTO cursors VALUES ('assessments', 1)"))
    assert hospital.look(3).places == 0
    assert Watch(hospital.places, hospital.records.engine).look(START + timedelta(days=3)).places == 1
