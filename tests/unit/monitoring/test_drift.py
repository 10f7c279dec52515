"""A verdict is scipy's test at Bonferroni's level, whatever Evidently draws around it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, ks_2samp

from imaging.vocabulary import Drift
from monitoring import drift
from monitoring.charts import find_change
from monitoring.drift import Comparison, compare

COLUMNS = ("median", "noise", "share_csf")
HOW = Comparison(task="brain", site="north", version=3, columns=COLUMNS, alpha=0.03, window=60,
                 simulated="Sites are drawn <not real> & small.")  # fmt: skip


def draw(seed, subjects, columns=COLUMNS):
    """Noise is 10 to 11; the others are about 0."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({name: rng.normal(0, 1, subjects) for name in columns})
    return table.assign(noise=rng.uniform(10, 11, subjects)) if "noise" in columns else table


def move(table):
    """From the 41st case on noise is 40 % higher."""
    moved = table["noise"].where(table.index < 40, table["noise"] * 1.4)
    return table.assign(noise=moved)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """One comparison, real to the last page, of a window whose noise moved."""
    var = tmp_path_factory.mktemp("var")
    old, new = draw(1, 100), move(draw(2, 60))
    return SimpleNamespace(old=old, new=new, var=var, verdict=compare(old, new, HOW, var))


@pytest.fixture
def unkept(monkeypatch):
    """Evidently still tests; its pages, which take a third of a second each, are not written."""
    run = drift._run

    def run_and_keep_nothing(*asked):
        return SimpleNamespace(dict=run(*asked).dict, save_html=lambda path: Path(path).write_text("<body>"))

    monkeypatch.setattr(drift, "_run", run_and_keep_nothing)
    monkeypatch.setattr(drift, "_keep", lambda *_: None)


def test_each_p_value_is_scipys(told):
    expected = {name: ks_2samp(told.old[name], told.new[name]).pvalue for name in COLUMNS}
    assert told.verdict.columns == pytest.approx(expected, rel=1e-9)
    assert len(set(expected.values())) == 3


def test_the_level_is_shared_by_the_columns():
    assert HOW.level == pytest.approx(0.01)
    assert replace(HOW, columns=("noise",)).level == 0.03


def test_a_column_that_moved_is_named_with_its_change_and_the_case(told):
    assert told.verdict.verdict is Drift.DRIFT
    change = told.new["noise"].iloc[40:].median() / told.old["noise"].median() - 1
    assert told.verdict.detail == f"noise {100 * change:+.0f} %, since case 41"
    assert 0.35 < change < 0.45


def test_the_page_says_what_it_is_about(told):
    page = Path(told.verdict.report)
    assert page == told.var / "report" / "brain" / "drift-north.html"
    text = page.read_text()
    for words in ("brain v3 at north", told.verdict.detail, "p &lt; 0.01", "Research use only",
                  "&lt;not real&gt; &amp; small", "share_csf"):  # fmt: skip
        assert words in text
    assert "<not real>" not in text.split("</h1>")[1].split("</div>")[0]


def test_the_workspace_has_the_run_and_no_table_beside_it(told):
    from evidently.ui.workspace import Workspace

    workspace = Workspace.create(str(told.var / "evidently"))
    (project,) = workspace.search_project("brain at north")
    (run,) = workspace.list_runs(project.id)
    kept = workspace.get_run(project.id, run)
    assert {"north", "v3"} <= set(kept.tags)
    files = {path.relative_to(told.var / "evidently") for path in (told.var / "evidently").rglob("*.*")}
    assert {(path.parts[1], path.suffix) for path in files} == {
        ("metadata.json", ".json"),
        ("snapshots", ".json"),
    }


@pytest.mark.parametrize(("reference", "current"), [(100, 59), (19, 60), (0, 60), (100, 0)])
def test_with_too_few_cases_nothing_is_claimed(tmp_path, reference, current):
    verdict = compare(draw(1, reference), draw(2, current), HOW, tmp_path)
    assert verdict.verdict is Drift.TOO_FEW
    assert verdict.detail == f"{current} of 60 subjects, {reference} in the reference"
    assert (verdict.columns, verdict.report, list(tmp_path.iterdir())) == ({}, "", [])


def test_several_columns_are_named_from_the_most_moved_and_in_deviations_where_a_ratio_has_no_sense(
    unkept, tmp_path
):
    old, new = draw(3, 100), move(draw(4, 60))
    new["median"] += 5
    verdict = compare(old, new, HOW, tmp_path)
    assert verdict.detail.startswith("median +")
    assert " sd, since case " in verdict.detail
    assert verdict.detail.endswith("; also noise")


def test_a_hundred_windows_without_a_change_alarm_as_often_as_the_level_says(unkept, tmp_path):
    how = replace(HOW, columns=("median",), alpha=0.1)
    old, rng = draw(5, 1000, how.columns), np.random.default_rng(6)
    alarms = 0
    for _ in range(100):
        reference = pd.DataFrame({"median": rng.normal(0, 1, 100)})
        current = pd.DataFrame({"median": rng.normal(0, 1, 60)})
        alarms += compare(reference, current, how, tmp_path).verdict is Drift.DRIFT
    assert len(old) == 1000
    assert binom.ppf(0.001, 100, 0.1) <= alarms <= binom.ppf(0.999, 100, 0.1)


@pytest.mark.parametrize("case", [5, 31, 56])
def test_the_case_of_a_change_is_found(case):
    values = np.random.default_rng(case).normal(0, 0.1, 60) + (np.arange(1, 61) >= case)
    assert find_change(values) == case
    assert find_change(7 - 3 * values) == case


@pytest.mark.parametrize("case", [5, 31, 56])
def test_the_case_of_a_change_is_found_among_values_that_are_equal(case):
    assert find_change((np.arange(1, 61) >= case).astype(float)) == case


def test_one_outlier_does_not_hide_the_change():
    values = (np.arange(60) >= 30) + np.random.default_rng(1).normal(0, 0.1, 60)
    values[3] = 1e6
    assert abs(find_change(values) - 31) <= 1


def test_embeddings_are_one_more_column_of_the_report_and_are_found_without_evidently_drawing_them(tmp_path):
    """Our two-sample test, natively: a metric with a test, in the page and in the workspace's snapshot."""
    from evidently.ui.workspace import Workspace

    axes = ("e0", "e1", "e2")
    how = replace(HOW, axes=axes)
    old, new = (draw(seed, count, (*COLUMNS, *axes)) for seed, count in ((7, 100), (8, 60)))
    same = compare(old, new, how, tmp_path)
    assert same.verdict is Drift.IN_BOUNDS
    assert how.level == pytest.approx(0.03 / 4)
    new["e1"] += 1.5
    verdict = compare(old, new, how, tmp_path)
    assert verdict.verdict is Drift.DRIFT
    assert verdict.detail == "embeddings differ, no column does"
    assert verdict.columns["embedding"] < how.level < min(verdict.columns[name] for name in COLUMNS)
    assert "Embeddings: two-sample test of 3 principal axes" in Path(verdict.report).read_text()
    workspace = Workspace.create(str(tmp_path / "evidently"))
    (project,) = workspace.search_project("brain at north")
    kept = workspace.get_run(project.id, workspace.list_runs(project.id)[-1]).dict()
    assert any("EmbeddingWindow" in str(one) for one in kept["metric_results"].values())
