"""A pass counts every row once, whatever happens meanwhile, and judges what is new by itself."""

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pytest
from sqlalchemy import text

from imaging.config import Places, read_places
from monitoring.journal import Prediction, open_journal
from monitoring.overview import read_overviews, read_streams
from monitoring.parquet import export_journal
from monitoring.records import Alarm, Refusal, open_records
from monitoring.streams import MOST
from monitoring.watching import Watch
from registry.database import writing

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
from monitoring.watching import Watch
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


def test_a_second_monitor_is_told(hospital):
    from imaging.errors import Conflict

    hospital.send((0, 1))
    streams, _ = _open(hospital)
    hospital.look(1)
    with pytest.raises(Conflict, match="Another monitor"):
        hospital.watch._write([streams], [], [])


def _open(hospital):
    from monitoring.streams import Streams, pack

    streams = Streams("lung-nodule", "north", 1)
    return {**pack(streams), "before": 7}, replace(streams)
