"""The cross-site card equals what the rows together give, and no small cell leaves a site."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.special import expit

from imaging.errors import DataError
from imaging.intervals import wilson
from imaging.scores import brier, reliability
from monitoring.accuracy_commands import card as command
from monitoring.crosssite import build_card, combine, foresee, render_card
from monitoring.site_exports import hold_to
from monitoring.sums import MEANS, SHARES, Statistics, read_statistics, sum_up, write_statistics

SITES = ("north", "east", "south", "west")
KEPT = {"task": "nodes", "version": 3, "package": "sha256:1", "threshold": 0.5, "source": "live",
        "simulated": "Everything is drawn.", "at": "2026-11-23T00:00:00"}  # fmt: skip


def draw_site(seed, subjects=400, images=1, sharp=1.5):
    """Scores, decisions, truths and subjects of a site."""
    rng = np.random.default_rng(seed)
    own = np.repeat(rng.normal(0, sharp, subjects), images)
    scores = expit(own + rng.normal(0, 0.5, len(own)))
    truth = (rng.random(len(scores)) < scores).astype(int)
    people = np.repeat([f"{seed}-{number}" for number in range(subjects)], images)
    return scores, scores >= 0.5, truth, people


def export(site, columns, **told):
    return Statistics(**{**KEPT, "site": site, **told}, **sum_up(*columns, told.get("threshold", 0.5)))


def answer_so(right, ill, wrong, healthy):
    """A site with so many right answers among its ill, and wrong ones among its healthy."""
    rng, truth = np.random.default_rng(ill), np.repeat([1, 0], [ill, healthy])
    positive = np.repeat([True, False, True, False], [right, ill - right, wrong, healthy - wrong])
    scores = np.where(positive, rng.uniform(0.5, 1, len(truth)), rng.uniform(0, 0.5, len(truth)))
    return scores, positive, truth, np.array([f"{ill}-{number}" for number in range(len(truth))])


def join(columns):
    return tuple(np.concatenate(parts) for parts in zip(*columns, strict=True))


def measure_rows(scores, positive, truth, people):
    """The same from rows, by other code: house intervals for shares, pandas for means."""
    right = (positive == truth).astype(int)
    rows = {"accuracy": slice(None), "sensitivity": truth == 1, "specificity": truth == 0}
    found = {name: (told.estimate, told.low, told.high) for name, chosen in rows.items()
             if (told := wilson(right[chosen], people[chosen]))}  # fmt: skip
    table = pd.DataFrame({"who": people, "brier": (scores - truth) ** 2, "in_the_large": truth - scores})
    for name in MEANS:
        middle = table[name].mean()
        left = (table[name] - middle).groupby(table["who"]).sum()
        half = 1.959963984540054 * np.sqrt(len(left) / (len(left) - 1) * (left**2).sum()) / len(table)
        found[name] = (middle, middle - half, middle + half)
    return found


def test_it_equals_the_computation_on_rows_to_a_billionth_where_nothing_is_withheld():
    columns = {site: draw_site(number, 2500, images=2) for number, site in enumerate(SITES)}
    told = [export(site, own) for site, own in columns.items()]
    assert all(not one.withheld and one.accuracy.rounded is None for one in told)
    card = build_card(told)
    assert card["missing"] == []
    for site in SITES:
        for shown, rows in (
            (card["sites"][site], [columns[site]]),
            (card["pooled"], list(columns.values())),
            (card["left_out"][site], [own for name, own in columns.items() if name != site]),
        ):
            for name, expected in measure_rows(*join(rows)).items():
                found = [shown[name][end] for end in ("estimate", "low", "high")]
                assert found == pytest.approx(expected, abs=1e-9, rel=0)
    scores, _, truth, _ = join(list(columns.values()))
    assert card["pooled"]["brier"]["estimate"] == pytest.approx(brier(truth, scores), abs=1e-12)
    bins = [{name: row[name] for name in ("said", "share", "count")} for row in card["pooled"]["bins"]]
    assert [pytest.approx(row, abs=1e-9) for row in reliability(truth, scores)] == bins


def test_one_image_a_subject_is_exact_too_and_the_worst_site_is_named():
    columns = {site: draw_site(number, 500, sharp=1 + number / 2) for number, site in enumerate(SITES)}
    card = build_card([export(site, own) for site, own in columns.items()])
    shares = {site: float((own[1] == own[2]).mean()) for site, own in columns.items()}
    worst = card["worst"]["accuracy"]
    assert worst["site"] == min(shares, key=shares.get)
    pooled = float((join(columns.values())[1] == join(columns.values())[2]).mean())
    assert worst["below_pooled"] == pytest.approx(pooled - min(shares.values()), abs=1e-12)
    assert worst["below_best"] == pytest.approx(max(shares.values()) - min(shares.values()), abs=1e-12)


def list_counts(told):
    """Every count that a file gives away: sums of whole numbers, and differences of those that overlap."""
    counts = {}
    for name in SHARES:
        if one := getattr(told, name):
            counts |= {f"{name} right": one.hits, f"{name} wrong": one.cases - one.hits, name: one.cases}
    if told.brier:
        counts["all"] = told.brier.cases
    for one in told.bins or ():
        counts |= {f"bin {one.high}": one.count, f"positives {one.high}": one.positives,
                   f"negatives {one.high}": one.count - one.positives}  # fmt: skip
    if {"sensitivity", "specificity"} & {name for name in SHARES if getattr(told, name)} and told.brier:
        shown = told.sensitivity or told.specificity
        counts["the other class"] = told.brier.cases - shown.cases
    if told.accuracy and bool(told.sensitivity) != bool(told.specificity):
        shown = told.sensitivity or told.specificity
        counts["right of the other"] = told.accuracy.hits - shown.hits
        counts["wrong of the other"] = told.accuracy.cases - told.accuracy.hits - shown.cases + shown.hits
    return counts


@pytest.mark.parametrize("threshold", [0.2, 0.45, 0.5, 0.83])
def test_no_count_under_ten_leaves_a_site_not_even_as_a_difference(threshold):
    rng, shown = np.random.default_rng(1), set()
    for seed in range(60):
        scores, _, truth, people = draw_site(seed, int(rng.integers(5, 250)), sharp=rng.uniform(0.5, 4))
        told = export("north", (scores, scores >= threshold, truth, people), threshold=threshold)
        assert all(count >= 10 for count in list_counts(told).values()), told
        shown.add(tuple(told.withheld))
        if told.bins:  # the answers on one side of the threshold, less whole bins, leave whole bins
            assert threshold in {one.high for one in told.bins}
    assert len(shown) >= 3


def test_a_subjects_images_give_away_no_small_group_and_the_interval_is_only_wider():
    columns = draw_site(3, 120, images=2, sharp=2.5)
    told = export("north", columns)
    both_wrong = pd.Series(columns[1] != columns[2]).groupby(columns[3]).sum().eq(2).sum()
    assert both_wrong < 10
    assert told.accuracy.rounded is not None
    assert told.accuracy.hits2 is None
    card = build_card([told])
    rows = measure_rows(*columns)["accuracy"]
    assert card["sites"]["north"]["accuracy"]["low"] <= rows[1]
    assert card["sites"]["north"]["accuracy"]["high"] >= rows[2]
    assert any("rounded the sums of squares" in sentence for sentence in card["missing"])


def test_what_is_withheld_is_said_and_the_pooled_value_names_its_sites():
    small = draw_site(9, 60, sharp=4)
    columns = {site: draw_site(number) for number, site in enumerate(SITES)} | {"harbour": small}
    card = build_card([export(site, own) for site, own in columns.items()])
    assert "sensitivity" not in card["sites"]["harbour"]
    assert card["pooled"]["sensitivity"]["sites"] == sorted(SITES)
    assert any(sentence.startswith("harbour withheld") for sentence in card["missing"])
    page = render_card(card)
    for words in ("Research use only", "Everything is drawn.", "harbour withheld", "withheld</td>"):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")


def test_good_sites_that_withhold_their_few_errors_are_told_and_above_a_fifth_nothing_is_pooled():
    """Six of twelve have 91 % and six 89 %: the six that tell would make 89 % of 90."""
    good, poor = (91, 100, 20, 200), (89, 100, 20, 200)
    told = [export(f"s{n:02}", answer_so(*(good if n < 6 else poor))) for n in range(12)]
    assert told[0].withheld["sensitivity"] == told[0].withheld["accuracy"] == "fewer than ten errors"
    assert export("bad", answer_so(5, 100, 20, 200)).withheld["sensitivity"] == "fewer than ten right answers"
    assert export("low", answer_so(12, 15, 20, 200)).withheld["sensitivity"] == "too few cases"
    card = build_card(told)
    assert card["absent"]["sensitivity"]["sites"] == [f"s{n:02}" for n in range(6)]
    assert (card["absent"]["sensitivity"]["cases"], card["next_site"]["sensitivity"]) == (1800, None)
    assert not {"sensitivity", "accuracy", "bins"} & set(card["pooled"])
    assert card["worst"]["sensitivity"]["below_pooled"] is None
    assert card["pooled"]["specificity"]["estimate"] == pytest.approx(0.9)
    words = "6 of 12 sites (1800 of 3600 cases) are left out for fewer than ten errors; the others look worse"
    assert words in card["missing"][1]
    assert render_card(card).count(words) == 6  # of sensitivity, accuracy and bins, each above and beside
    card = build_card(told[4:])  # a fourth of the sites
    assert "sensitivity" not in card["pooled"]
    card = build_card([*told[5:], *(export(f"t{n}", answer_so(*poor)) for n in range(3))])
    assert card["pooled"]["sensitivity"]["estimate"] == pytest.approx(0.89)
    assert card["next_site"]["sensitivity"]["sites"] == 9
    assert "1 of 10 sites (300 of 3000 cases) are left out" in render_card(card)


@pytest.mark.parametrize("sites", [3, 5, 10])
def test_an_interval_for_the_next_site_holds_it_where_sites_are_equal(sites):
    rng, true, inside = np.random.default_rng(sites), np.log(0.85 / 0.15), 0
    for _ in range(400):
        cases = rng.integers(100, 600, sites)
        shares = rng.binomial(cases, 0.85) / cases
        found = combine(np.log(shares / (1 - shares)), 1 / (cases * shares * (1 - shares)))
        inside += found["next"][0] <= true <= found["next"][1]
    assert inside / 400 >= 0.93


def test_sites_that_agree_more_than_chance_would_have_it_give_a_card_without_nan(tmp_path):
    paths = []
    for right, ill in ((230, 275), (95, 114), (82, 98), (66, 77), (153, 175)):
        paths.append(tmp_path / f"s{ill}.json")
        write_statistics(export(f"s{ill}", answer_so(right, ill, 20, 200)), paths[-1])
    told = CliRunner().invoke(command, [*map(str, paths), "--json"], catch_exceptions=False)
    card = json.loads(told.output, parse_constant=pytest.fail)
    assert card["next_site"]["sensitivity"]["mean"][0] == pytest.approx(626 / 739, abs=0.005)
    body = json.loads(paths[0].read_text())
    for hits in (float("nan"), 1e9):
        paths[0].write_text(json.dumps(body | {"sensitivity": {**body["sensitivity"], "hits": hits}}))
        with pytest.raises(DataError):
            read_statistics(paths[0])


def test_random_effects_are_those_of_the_published_example():
    """Thirteen trials of BCG vaccine (Colditz 1994; metafor dat.bcg): cases and others of both arms."""
    cases = np.array([4, 6, 3, 62, 33, 180, 8, 505, 29, 17, 186, 5, 27])
    others = np.array([119, 300, 228, 13536, 5036, 1361, 2537, 87886, 7470, 1699, 50448, 2493, 16886])
    cases0 = np.array([11, 29, 11, 248, 47, 372, 10, 499, 45, 65, 141, 3, 29])
    others0 = np.array([128, 274, 209, 12619, 5761, 1079, 619, 87892, 7232, 1600, 27197, 2338, 17825])
    all1, all0 = cases + others, cases0 + others0
    found = combine(np.log(cases / all1 / (cases0 / all0)), 1 / cases - 1 / all1 + 1 / cases0 - 1 / all0)
    assert found["tau2"] == pytest.approx(0.30876, abs=1e-5)
    assert found["mean"] == pytest.approx([-0.71412, -1.1078, -0.3204], abs=1e-4)
    # With t of 12 degrees the example says -1.9872, .5590; of 11 it is wider by the ratio of the two t.
    half = (0.5590 + 1.9872) / 2 * 2.200985 / 2.178813
    assert found["next"] == pytest.approx([-0.71412 - half, -0.71412 + half], abs=2e-4)


def test_the_next_site_is_indicative_under_ten_sites_and_unknown_under_three():
    told = build_card([export(f"site-{number}", draw_site(number)) for number in range(10)])
    sites = [one["accuracy"] for one in told["sites"].values()]
    assert foresee(sites[:2]) is None
    assert foresee(sites[:9])["indicative"] is True
    ahead = foresee(sites)
    assert ahead["indicative"] is False
    assert ahead["next"][0] <= ahead["mean"][1] <= ahead["mean"][0] <= ahead["mean"][2] <= ahead["next"][1]


@pytest.mark.parametrize(
    ("name", "value"), [("package", "sha256:2"), ("version", 4), ("task", "discs"), ("source", "locked")]
)
def test_a_card_mixes_no_packages(name, value):
    one, other = export("north", draw_site(1)), export("east", draw_site(2), **{name: value})
    with pytest.raises(DataError, match=f"more than one {name}"):
        build_card([one, other])
    with pytest.raises(DataError, match="More than one file is of north"):
        build_card([one, one])


def test_a_file_that_differs_from_the_last_by_a_few_cases_is_refused(tmp_path):
    columns = draw_site(1, 400)
    first = export("north", tuple(column[:380] for column in columns))
    for count, fits in ((380, True), (383, False), (400, None)):
        told = export("north", tuple(column[:count] for column in columns))
        if fits is False:
            with pytest.raises(DataError, match="fewer than ten cases"):
                hold_to(first, told, tmp_path)
        elif fits:
            hold_to(first, told, tmp_path)
    hold_to(first, export("north", draw_site(1, 4000)), tmp_path)


def test_no_sum_betrays_what_came_since_the_last_file(tmp_path):
    """One more case shows in the sums of all alone; a case more within other bins, and another truth, too."""
    some = answer_so(45, 60, 4, 100)
    first = export("north", some)
    assert {name for name in (*SHARES, *MEANS) if getattr(first, name)} == {"sensitivity", *MEANS}
    one = tuple(np.append(old, new) for old, new in zip(some, (0.8371, True, 0, "new"), strict=True))
    swapped = (*some[:2], np.where(np.isin(np.arange(160), [0, 60]), 1 - some[2], some[2]), some[3])
    for columns in (one, (some[0] ** 1.01, *some[1:]), swapped):
        with pytest.raises(DataError, match="fewer than ten cases"):
            hold_to(first, export("north", columns), tmp_path)
    alone = export("north", draw_site(1, 3000)).model_copy(update=dict.fromkeys((*SHARES, *MEANS)))
    left, right, *others = alone.bins
    wide = {"low": 0.0, "count": left.count + right.count + 1, "positives": left.positives + right.positives}
    with pytest.raises(DataError, match="bins"):
        hold_to(alone, alone.model_copy(update={"bins": (right.model_copy(update=wide), *others)}), tmp_path)
    hold_to(first, first.model_copy(update={"at": "later"}), tmp_path)


def test_a_file_is_read_as_it_was_written_and_a_changed_one_is_refused(tmp_path):
    told, path = export("north", draw_site(1)), tmp_path / "north.json"
    write_statistics(told, path)
    assert read_statistics(path) == told
    body = json.loads(path.read_text())
    for change in ({"format": 2}, {"rows": [1]}, {"accuracy": {**body["accuracy"], "cases": 3}}):
        path.write_text(json.dumps(body | change))
        with pytest.raises(DataError):
            read_statistics(path)


def test_the_command_prints_the_card_and_writes_the_page(tmp_path):
    paths = []
    for number, site in enumerate(SITES):
        paths.append(tmp_path / f"{site}.json")
        write_statistics(export(site, draw_site(number)), paths[-1])
    page = tmp_path / "card.html"
    told = CliRunner().invoke(command, [*map(str, paths), "--out", str(page)], catch_exceptions=False)
    assert "The next site's accuracy" in told.output
    assert "indicative" in page.read_text()
    told = CliRunner().invoke(command, [*map(str, paths), "--json"], catch_exceptions=False)
    assert set(json.loads(told.output)["sites"]) == set(SITES)


def test_a_file_from_before_reasons_were_told_can_be_read(tmp_path):
    path = tmp_path / "old.json"
    told = Statistics(task="t", version=1, package="sha256:0", threshold=0.5, site="north", source="live",
                      simulated="", at="2026-11-01T00:00:00", withheld={"bins": "too few cases"})  # fmt: skip
    write_statistics(told, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"withheld": ["bins"]}))
    assert read_statistics(path).withheld == {"bins": "why is not told"}
