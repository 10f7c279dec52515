"""The study's runs are made once, go on after a kill with the same bits, and become a page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from imaging.config import Places
from imaging.errors import ConfigError, DataError
from imaging.manifest import digest_file
from imaging.vocabulary import Kind
from tests.tiny import ROOT, write_cohort, write_root
from training.adaptation import leave_sites_out
from training.runs import choose_cut
from training.study import DECISIONS, claim_folder, plan_runs, read_study, run_claim
from training.study_report import judge_stored, report_study

PLAIN = {"fit": {"augmentation": {"flip": False, "shift_px": 0, "gain": 0.0, "offset": 0.0, "noise": 0.0}}}
CLAIMS = yaml.safe_load("""
accuracy:
  sentence: It is right
  task: tiny
  control: nothing
  variants: {cnn: {}}
  plot: course
  rows: [{show: accuracy, of: cnn, above: 0.99}, {show: auc, of: cnn, where: external}]
  untestable: [{sentence: It is liked, why: nobody was asked}]
robustness:
  sentence: It bears more
  task: tiny
  control: plain
  variants: {augmented: {}}
  ensembles: {both: [augmented, plain]}
  corruption: {subjects: 6, severities: [3], families: [noise, contrast]}
  maps: {images: 8}
  rows:
    - {show: drop saved, of: augmented, against: plain, where: seen, above: 0.25}
    - {show: drop, of: plain, where: held out}
    - {show: energy, of: augmented}
    - {show: auc, of: both, against: "both: best member"}
    - {show: auc, of: "both: all members"}
""")
CLAIMS["robustness"]["variants"]["plain"] = PLAIN


def write_checkout(root):
    places = write_root(root, tiny=Kind.CLASSIFICATION)
    write_cohort(places, "tiny", Kind.CLASSIFICATION)
    path = root / DECISIONS
    path.parent.mkdir(parents=True)
    told = {"seeds": [1, 2], "fit": {"tiny": {"epochs": 1}}, "claims": CLAIMS}
    path.write_text(yaml.safe_dump(told, sort_keys=False))
    (root / "docs").mkdir()
    return places


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A checkout whose two claims have run and whose page is written."""
    places = write_checkout(tmp_path_factory.mktemp("study"))
    study = read_study(places)
    for name in study.claims:
        run_claim(places, study, name, claim_folder(places, name))
    report_study(places, study)
    return places, study


def test_claims_share_runs_and_a_second_time_none_is_made(done):
    places, study = done
    runs = sorted((places.build / "study" / "runs").iterdir())
    assert len(runs) == 4  # two recipes, two seeds
    times = [path.stat().st_mtime_ns for run in runs for path in sorted(run.iterdir())]
    before = digest_file(claim_folder(places, "robustness") / "answers.parquet")
    run_claim(places, study, "robustness", claim_folder(places, "robustness"))
    assert times == [path.stat().st_mtime_ns for run in runs for path in sorted(run.iterdir())]
    assert digest_file(claim_folder(places, "robustness") / "answers.parquet") == before


def test_a_killed_study_goes_on_with_the_same_bits(done, tmp_path):
    places = write_checkout(tmp_path)
    script = ("from training.study import *; from imaging.config import read_places; p = read_places();"
              "s = read_study(p).model_copy(update={'processes': 1});"
              "run_claim(p, s, 'accuracy', claim_folder(p, 'accuracy'))")  # fmt: skip
    environment = {**os.environ, "FORMULARY_ROOT": str(places.root), "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    folders = [
        run.folder
        for run in plan_runs(places, read_study(places), read_study(places).claims["accuracy"]).values()
    ]
    first, second = (folder / "answers.parquet" for folder in folders)
    until = time.monotonic() + 240
    while not first.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert first.exists()
    assert not second.exists()
    finished = first.stat().st_mtime_ns
    run_claim(places, read_study(places), "accuracy", claim_folder(places, "accuracy"))
    assert first.stat().st_mtime_ns == finished
    whole, resumed = (digest_file(claim_folder(p, "accuracy") / "answers.parquet") for p in (done[0], places))
    assert whole == resumed


def test_answers_are_of_locked_sets_and_corruption_is_told_by_what_was_drawn(done):
    table = pd.read_parquet(claim_folder(done[0], "robustness") / "answers.parquet")
    assert set(table["split"]) == {"test", "external"}
    worse = table[table["family"] != ""]
    assert set(worse["split"]) == {"test"}
    assert worse.groupby(["variant", "seed", "family"]).size().eq(6).all()
    assert worse.groupby(["variant", "family"])["seen"].first().to_dict() == {
        ("augmented", "noise"): True, ("augmented", "contrast"): False,
        ("plain", "noise"): False, ("plain", "contrast"): False,
    }  # fmt: skip
    assert table["energy"].between(0, 1).sum() == 4 * 8


def test_the_page_and_its_pictures_tell_the_stored_numbers(done):
    places, study = done
    page = (places.root / "docs" / "study.md").read_text()
    verdicts = json.loads((places.build / "study" / "verdicts.json").read_text())
    for name, claim in study.claims.items():
        picture = places.root / "docs" / "pictures" / "study" / f"{name}.svg"
        assert f"{claim.sentence}: **{verdicts[name]['verdict']}**" in page
        assert f"pictures/study/{name}.svg" in page
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        assert picture.stat().st_size < 200_000
        for row in verdicts[name]["rows"]:
            assert (
                row["reason"] if "reason" in row else "{estimate:.3f} [{low:.3f} {high:.3f}]".format(**row)
            ) in page
    assert "| It is liked | nothing: nobody was asked | none | **cannot be tested here** |" in page
    assert "Everything is drawn." in page
    assert not re.search(r"\{\{|\{%|None|nan", page)
    before = [path.read_bytes() for path in sorted((places.root / "docs").rglob("*.*"))]
    report_study(places, study)
    assert before == [path.read_bytes() for path in sorted((places.root / "docs").rglob("*.*"))]


def test_a_site_that_is_left_out_is_not_learnt_from(done, tmp_path):
    places, _ = done
    study = leave_sites_out(places, "tiny", (1,)).model_copy(update={"fit": {"tiny": {"epochs": 1}}})
    run_claim(places, study, "sites", tmp_path)
    told = {run["variant"]: run for run in json.loads((tmp_path / "runs.json").read_text())["runs"]}
    assert {run["leave_out"] for run in told.values()} == {None, "north", "east"}
    assert told["without east"]["subjects"] == told["all sites"]["subjects"] / 2
    rows = {row["what"]: row for row in judge_stored(study, "sites", tmp_path)["rows"]}
    answers = pd.read_parquet(tmp_path / "answers.parquet").query("site == 'east'")
    parts = (answers[answers["variant"] == name] for name in ("all sites", "without east"))
    seen, unseen = (roc_auc_score(part["truth"], part["score"]) for part in parts)
    assert rows["auc of all sites less that of without east, east"]["estimate"] == pytest.approx(
        seen - unseen
    )
    assert "over 3 sites, indicative" in rows["new site of all sites, one more"]["method"]


def test_what_is_misspelt_or_has_not_run_is_refused_by_name(done):
    places, study = done
    with pytest.raises(ConfigError, match="'robustness'"):
        run_claim(places, study, "robustnes", places.build)
    claim = study.claims["accuracy"]
    wrong = claim.model_copy(
        update={"variants": {"cnn": claim.variants["cnn"].model_copy(update={"fit": {"epoch": 1}})}}
    )
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        plan_runs(places, study, wrong)
    nothing = Places(root=places.root, build=places.root / "nowhere", var=places.var)
    with pytest.raises(DataError, match=r"manifest\.parquet"):
        plan_runs(nothing, study, claim)
    with pytest.raises(DataError, match="study run accuracy"):
        judge_stored(study, "accuracy", places.build / "nowhere")


def test_the_threshold_has_the_most_right_answers():
    rng = np.random.default_rng(3)
    for _ in range(20):
        truth, score = rng.integers(0, 2, 30), rng.integers(0, 8, 30) / 8
        found = ((score >= choose_cut(score, truth)) == truth).mean()
        assert found == max(((score >= cut) == truth).mean() for cut in (*np.unique(score), 0.0, 2.0))


def test_the_checkouts_own_study_can_be_planned(tmp_path):
    places = Places(root=ROOT, build=tmp_path, var=tmp_path)
    study = read_study(places)
    for task in {claim.task for claim in study.claims.values()}:
        (places.stage(task, "split")).mkdir(parents=True)
        (places.stage(task, "split") / "manifest.parquet").write_bytes(task.encode())
    assert len(study.seeds) >= 3
    free = {
        name: claim for name, claim in study.claims.items() if claim.task == "lung-nodule"
    }  # of files to borrow
    runs = {
        (name, *key): run
        for name, claim in free.items()
        for key, run in plan_runs(places, study, claim).items()
    }
    assert len(free) >= 6
    own = runs["tumour-accuracy", "cnn", 1].folder
    assert own == runs["robustness", "augmented", 1].folder == runs["labels", "all", 1].folder
    assert own not in {runs["robustness", "plain", 1].folder, runs["robustness", "augmented", 2].folder}


def test_the_pipeline_depends_on_files_that_are_there():
    pipeline = yaml.safe_load((ROOT / DECISIONS).with_name("dvc.yaml").read_text())["stages"]
    deps = [dep for stage in (pipeline["run"]["do"], pipeline["report"]) for dep in stage["deps"]]
    assert [dep for dep in deps if not dep.startswith("build/") and not (ROOT / dep).exists()] == []
    assert Path("training/templates/study.md.j2") in [Path(dep) for dep in deps]
