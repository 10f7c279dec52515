"""The charts have the run lengths of the literature, whatever the values are, and find what moves."""

import numpy as np
import pytest
from scipy.stats import kstest, norm, poisson

from imaging.vocabulary import Unit
from monitoring.charts import (
    HISTORY,
    Chart,
    Setting,
    advance,
    find_limit,
    limit,
    normal_score,
    path,
    run_length,
)
from registry.surveillance import Surveillance

SETTING = Setting(limit=5.0, allowance=0.5, least=20, seed=1)
RATE = 1 / 465.44  # of a two-sided chart with these (R spc)
DRAWS = {
    "normal": lambda rng, shape: rng.normal(7, 3, shape),
    "exponential": lambda rng, shape: rng.exponential(2, shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(1.5, shape),
    "counts": lambda rng, shape: rng.poisson(1.5, shape).astype(float),
    "yes or no": lambda rng, shape: (rng.random(shape) < 0.3).astype(float),
}


def run(values, setting=SETTING):
    chart = Chart.start(values.shape[1])
    return advance(chart, values[:0], values, setting), chart


def test_the_run_lengths_are_those_that_are_published():
    assert run_length(4, 0.5) == pytest.approx(335.37, abs=0.005)
    assert run_length(5, 0.5) / 2 == pytest.approx(465.44, abs=0.005)
    assert find_limit(5400, 0.25) == pytest.approx(13.264, abs=0.0005)
    assert find_limit(5400, 0.5) == pytest.approx(7.438, abs=0.0005)


def test_the_limit_gives_each_stream_an_equal_part_of_what_the_window_test_leaves():
    by_subject = Surveillance(budget_days=67.5, unit=Unit.SUBJECT, per_day=20, window_share=0.25)
    by_day = Surveillance(budget_days=405, unit=Unit.DAY, window_share=0.25, allowance=0.25)
    assert limit(by_subject, 3) == pytest.approx(7.438, abs=0.0005)
    assert limit(by_day, 10) == pytest.approx(13.264, abs=0.0005)


def test_a_budget_that_even_no_limit_exceeds_has_limit_zero():
    assert find_limit(1, 0.5) == 0


@pytest.mark.parametrize(
    ("history", "value", "draw", "place"),
    [([1, 2, 4], 3, 0.5, 2.5 / 4), ([1, 2, 2, 3], 2, 0.25, 1.75 / 5), ([1, 2], 5, 0.1, 2.1 / 3),
     ([np.nan, 1, 2], 0, 0.9, 0.9 / 3)],
)  # fmt: skip
def test_a_score_is_the_normal_quantile_of_the_place_among_earlier_values(history, value, draw, place):
    score = normal_score(np.array(history, float)[:, None], np.array([float(value)]), draw)
    assert score == pytest.approx(norm.ppf(place))


@pytest.mark.parametrize("kind", DRAWS)
def test_scores_are_independent_and_normal_whatever_the_values_are(kind):
    values = DRAWS[kind](np.random.default_rng(3), (600, 8))
    rng = np.random.default_rng(4)
    scores = np.array([normal_score(values[:row], values[row], rng.random(8)) for row in range(20, 600)])
    assert kstest(scores.ravel(), norm.cdf).pvalue > 0.001
    assert abs(np.corrcoef(scores[:-1].ravel(), scores[1:].ravel())[0, 1]) < 4 / np.sqrt(scores.size)


@pytest.mark.parametrize("kind", DRAWS)
def test_streams_of_any_distribution_alarm_as_often_as_was_set(kind):
    found, _ = run(DRAWS[kind](np.random.default_rng(5), (800, 200)))
    assert poisson.ppf(0.001, 0.93 * 160_000 * RATE) <= len(found) <= poisson.ppf(0.999, 160_000 * RATE)


def test_missing_values_take_no_part_in_the_alarms():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(1200, 200))
    values[rng.random(values.shape) < 0.4] = np.nan
    found, _ = run(values)
    expected = np.count_nonzero(~np.isnan(values)) * RATE
    assert poisson.ppf(0.001, 0.93 * expected) <= len(found) <= poisson.ppf(0.999, expected)
    assert not any(np.isnan(values[one.row, one.stream]) for one in found)


def test_a_missing_value_leaves_the_sums_where_they_are():
    values = np.random.default_rng(7).normal(size=(60, 1))
    values[30:34] = np.nan
    up, down = path(values, SETTING)
    assert (up[30:34] == up[29]).all()
    assert (down[30:34] == down[29]).all()
    assert up[34] != up[29] or down[34] != down[29]


def test_a_step_in_one_stream_is_found_there_alone_with_its_direction_and_beginning():
    values = np.random.default_rng(8).normal(size=(260, 30))
    values[200:, 11] -= 1.5
    found, _ = run(values, Setting(find_limit(1e6, 0.5), 0.5, 20, 1))
    assert {one.stream for one in found} == {11}
    assert found[0].direction == "down"
    assert 200 < found[0].row < 225
    assert 190 <= found[0].since <= 204
    assert found[0].value > find_limit(1e6, 0.5)


def test_a_gradual_rise_is_found():
    values = np.random.default_rng(9).normal(size=(300, 40))
    values[100:] += np.linspace(0, 2, 200)[:, None]
    found, _ = run(values, Setting(find_limit(240 * 40, 0.5), 0.5, 20, 1))
    risen = {one.stream for one in found if one.direction == "up" and one.row > 100}
    assert len(risen) >= 38


def test_rows_one_by_one_are_the_same_as_all_in_one_go():
    rng = np.random.default_rng(10)
    values = np.column_stack([rng.normal(size=400), rng.poisson(1, 400), np.zeros(400), rng.normal(size=400)])
    values[rng.random(values.shape) < 0.2] = np.nan
    values[250:, 0] += 2
    whole, chart = run(values)
    one, found = Chart.start(4), []
    for row in range(400):
        found += advance(one, values[:row], values[row : row + 1], SETTING)
    assert found == whole
    assert len(found) > 2
    assert [one.up.tolist(), one.down.tolist()] == [chart.up.tolist(), chart.down.tolist()]
    assert (one.begun == chart.begun).all()


def test_a_history_whose_oldest_rows_were_forgotten_gives_the_same_sums():
    values = np.random.default_rng(11).poisson(2, (HISTORY + 300, 3)).astype(np.float32)
    whole, chart = run(values)
    one, kept, rows = Chart.start(3), values[:0], []
    for start in range(0, len(values), 100):
        fresh = values[start : start + 100]
        rows += [found.row + one.dropped for found in advance(one, kept, fresh, SETTING)]
        kept = np.concatenate([kept, fresh])
        forgotten = max(0, len(kept) - HISTORY)
        kept, one.dropped, one.begun = kept[forgotten:], one.dropped + forgotten, one.begun - forgotten
    assert rows == [found.row for found in whole]
    assert [one.up.tolist(), one.down.tolist()] == [chart.up.tolist(), chart.down.tolist()]
    assert (one.begun + one.dropped == chart.begun).all()


def test_no_chart_judges_before_its_least_number_of_values():
    values = np.concatenate([np.zeros(10), np.arange(1.0, 41)])[:, None] + [[0.0, 0.0]]
    values[:5, 1] = np.nan
    found, _ = run(values, Setting(4.0, 0.5, 30, 2))
    first = {stream: next(one.row for one in found if one.stream == stream) for stream in (0, 1)}
    assert first == {0: 29, 1: 34}


def test_a_sum_that_crossed_starts_again_at_nothing():
    values = np.random.default_rng(12).normal(size=(300, 1))
    values[150:] += 3
    found, _ = run(values)
    up, down = path(values, SETTING)
    rows = [one.row for one in found if one.direction == "up" and one.row >= 150]
    assert len(rows) > 1
    assert [up[row, 0] for row in rows] == [one.value for one in found if one.row in rows]
    assert all(up[row, 0] > SETTING.limit and up[row + 1, 0] < 4 for row in rows)
    assert min(up.min(), down.min()) >= 0


def test_a_stream_that_never_differs_says_nothing():
    values = np.full((500, 2), 3.0)
    values[400:, 1] = 8.0
    found, chart = run(values)
    assert {one.stream for one in found} == {1}
    assert (chart.up[0], chart.down[0]) == (0, 0)
