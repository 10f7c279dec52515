"""The window test is a permutation test with its level, and sees place and spread, of one column or all."""

import numpy as np
import pytest
from scipy.stats import binom, permutation_test

from monitoring.windows import PERMUTATIONS, compare_windows, level
from registry.surveillance import Surveillance


def draw(rng, subjects, axes=8):
    return rng.normal(size=(subjects, axes))


def draw_days(rng, days, a_day, effect, axes=8):
    """Subjects of days that differ, of variance 1 in all, and their days."""
    values = effect * rng.normal(size=(days, 1, axes)) + np.sqrt(1 - effect**2) * draw(
        rng, days * a_day
    ).reshape(days, a_day, axes)
    return values.reshape(-1, axes), np.repeat(np.arange(days), a_day)


def test_it_is_scipys_permutation_test_of_the_same_statistic():
    rng = np.random.default_rng(1)
    reference, window = draw(rng, 30, 3), draw(rng, 20, 3) + 0.35
    rows = np.concatenate([reference, window])

    def tell(old, new):  # from whole rows, in its own words
        together = np.concatenate([old, new])
        middle, total = np.median(together, axis=0), 0.0
        parts = []
        for column in range(3):
            for change in (lambda x: x, lambda x, c=column: abs(x - middle[c])):
                one, two = change(old[:, column]), change(new[:, column])
                scale = np.std(change(together[:, column])) ** 2 * (1 / len(old) + 1 / len(new))
                parts.append((two.mean() - one.mean()) ** 2 / scale)
                total += parts[-1]
        return total + 2 * max(parts)

    told = permutation_test(
        (np.arange(30), np.arange(30, 50)), lambda i, j: tell(rows[i.astype(int)], rows[j.astype(int)]),
        n_resamples=1999, alternative="greater", rng=np.random.default_rng(2),
    )  # fmt: skip
    statistic, p = compare_windows(reference, window, 1999, 3)
    assert statistic == pytest.approx(told.statistic)
    assert 0.005 < p < 0.5
    assert abs(p - told.pvalue) < 4 * np.sqrt(2 * p * (1 - p) / 1999)


@pytest.mark.parametrize("skew", [False, True])
def test_null_windows_alarm_at_its_level(skew):
    rng = np.random.default_rng(4)
    change = np.exp if skew else np.asarray
    found = sum(compare_windows(change(draw(rng, 60)), change(draw(rng, 40)), 99, seed)[1] <= 0.1
                for seed in range(500))  # fmt: skip
    assert binom.ppf(0.001, 500, 0.1) <= found <= binom.ppf(0.999, 500, 0.1)


def test_windows_of_days_that_differ_alarm_at_its_level_only_where_it_is_told_the_days():
    rng = np.random.default_rng(5)
    blind = aware = 0
    for seed in range(300):
        reference, (window, days) = draw(rng, 200), draw_days(rng, 14, 20, 0.3)
        blind += compare_windows(reference, window, 99, seed)[1] <= 0.1
        aware += compare_windows(reference, window, 99, seed, days)[1] <= 0.1
    assert binom.ppf(0.001, 300, 0.1) <= aware <= binom.ppf(0.999, 300, 0.13)
    assert blind > 90


def test_a_reference_of_few_days_counts_its_days_too():
    rng, found = np.random.default_rng(6), 0
    for seed in range(300):
        (reference, old), (window, new) = draw_days(rng, 14, 10, 0.3), draw_days(rng, 14, 10, 0.3)
        found += compare_windows(reference, window, 99, seed, np.concatenate([old, new]))[1] <= 0.1
    assert binom.ppf(0.001, 300, 0.1) <= found <= binom.ppf(0.999, 300, 0.13)


CHANGES = {
    "all a little": lambda window: window + 0.3,
    "one alone": lambda window: window + np.array([0, 0, 0, 0.8, 0, 0, 0, 0]),
    "spread of all": lambda window: window * 1.4,
    "spread of one": lambda window: window * [1, 1, 2, 1, 1, 1, 1, 1],
    "a tenth far away": lambda window: window + 3 * (np.arange(len(window)) < 10)[:, None],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dayed", [False, True])
def test_it_sees_place_and_spread_of_one_column_and_of_all(change, dayed):
    rng, seen = np.random.default_rng(7), 0
    for seed in range(10):
        window, days = draw_days(rng, 20, 5, 0.2 if dayed else 0)
        order = rng.permutation(100)  # so that the tenth is not of two days alone
        changed = CHANGES[change](window[order])
        seen += compare_windows(draw(rng, 200), changed, 199, seed, days[order] if dayed else None)[1] <= 0.02
    assert seen >= 8


def test_it_is_the_same_in_every_run_and_tells_nothing_of_a_column_that_never_differs():
    rng = np.random.default_rng(8)
    reference, window = draw(rng, 50), draw(rng, 40)
    assert compare_windows(reference, window, 199, 1) == compare_windows(reference, window, 199, 1)
    constant = [np.column_stack([part, np.ones(len(part))]) for part in (reference, window)]
    assert compare_windows(*constant, 199, 1) == pytest.approx(compare_windows(reference, window, 199, 1))


def test_the_level_spends_the_share_of_the_budget():
    asked = Surveillance(budget_days=180, window_share=0.25)
    assert level(asked, 14) == pytest.approx(14 * 0.25 / 180)
    assert level(asked.model_copy(update={"tasks": 4}), 14) == pytest.approx(14 * 0.25 / 720)
    assert level(asked, 0.1) == 1 / (PERMUTATIONS + 1)
    assert level(asked, 10_000) == 0.5
