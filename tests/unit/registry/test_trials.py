"""Silent trials: the stop rule errs as rarely as it says; a trial and a canary are people's decisions."""

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError
from statsmodels.stats.proportion import proportion_confint

from imaging.errors import Conflict, Forbidden, RegistryError
from imaging.vocabulary import Decision, Endpoint
from registry.actions import ACTIONS, perform
from registry.decisions import reject, retire, roll_back, suspend
from registry.package import read_contract, shelf, write_contract
from registry.promotion import approve, request
from registry.registration import register
from registry.trials.conduct import end_trial, report_trial, set_canary, start_trial
from registry.trials.plan import Plan, takes_canary
from registry.trials.report import _decide, report
from registry.trials.rows import Row, open_rows
from registry.trials.stopping import (
    count_needed,
    estimate_mean,
    find_bound,
    grow_capital,
    judge_values,
    value_subjects,
)

TASK = "brain-tissue"
PLAN = Plan(size=300, margin=0.05)
TRIALS = 2000


def simulate(plan, draw, trials=TRIALS):
    """Share of trials that pass and that fail; two images a subject, a look every ten cases."""
    drawn = draw(np.random.default_rng(11), (trials, plan.size))
    ends = np.arange(5, plan.size + 1, 5)
    bound, enough = find_bound(plan), np.log(2 / plan.alpha)
    first = []
    for values, against in ((drawn, bound), (1 - drawn, 1 - bound)):
        over = grow_capital(values, against)[:, ends - 1] >= enough
        first.append(np.where(over.any(axis=1), over.argmax(axis=1), len(ends)))
    told = np.where(first[0] < first[1], "passed", np.where(first[1] < first[0], "failed", "undecided"))
    for row in range(20):  # what is simulated at once is what the trial's own judge says of its cases
        people, scores = np.repeat(np.arange(plan.size), 2).astype(str), np.repeat(drawn[row], 2)
        verdict, _ = judge_values(plan, *value_subjects(list(people), list(scores), plan.look))
        assert verdict == told[row]
    return [(told == name).mean() for name in ("passed", "failed")]


def disagree(share):
    """1 where the finding is the same; a subject's two images differ together more often than not."""

    def draw(rng, shape):
        own = rng.beta(4 * share, 4 * (1 - share), shape)
        return 1 - rng.binomial(2, own) / 2

    return draw


def grade(difference, discordant):
    """1 where only the challenger is right, 0 where only the champion is."""

    def draw(rng, shape):
        better, worse = (discordant + difference) / 2, (discordant - difference) / 2
        return rng.choice([1, 0.5, 0], shape, p=[better, 1 - discordant, worse])

    return draw


@pytest.mark.parametrize("margin", [0.05, 0.1])
def test_at_the_margin_a_verdict_is_wrong_in_under_five_percent_of_trials(margin):
    plan = Plan(size=300, margin=margin)
    assert 0 < sum(simulate(plan, disagree(margin))) < 0.05
    accuracy = Plan(size=300, margin=margin, endpoint=Endpoint.ACCURACY)
    assert 0 < sum(simulate(accuracy, grade(-margin, 2 * margin))) < 0.05


def test_peeking_with_an_ordinary_interval_would_err_far_more_often():
    """That the simulation can tell: the same looks, Wilson's interval at each."""
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(100):
        differ = np.cumsum(rng.random(600) < 0.05)
        ends = [proportion_confint(differ[n - 1], n, 0.05, method="wilson") for n in range(10, 601, 10)]
        wrong += any(high < 0.05 or low > 0.05 for low, high in ends)
    assert wrong / 100 > 0.15


def test_a_good_challenger_mostly_passes_and_a_bad_one_fails():
    assert simulate(PLAN, disagree(0.005), 100)[0] > 0.9
    assert simulate(PLAN, disagree(0.2), 100)[1] > 0.9
    plan = Plan(size=300, margin=0.05, endpoint=Endpoint.ACCURACY)
    assert simulate(plan, grade(0.0, 0.03), 100)[0] > 0.9
    assert simulate(plan, grade(-0.2, 0.25), 100)[1] > 0.9


def test_the_capital_is_that_of_the_bets_worked_by_hand():
    """Bound .5: a stake s of one's capital is doubled or lost; over ten stakes .1 to 1 the mean."""
    capital = np.exp(grow_capital(np.array([1.0, 0.0]), 0.5))
    stakes = [tenth / 10 for tenth in range(1, 11)]
    assert capital[0] == pytest.approx(sum(1 + s for s in stakes) / 10)
    assert capital[1] == pytest.approx(sum((1 + s) * (1 - s) for s in stakes) / 10)


def test_a_capital_is_worth_on_average_what_it_was_where_the_bound_is_the_truth():
    """Exactly, over all 2^8 courses of eight subjects."""
    share, courses = 0.3, np.array(np.meshgrid(*[[0.0, 1.0]] * 8)).reshape(8, -1).T
    weights = np.prod(np.where(courses == 1, share, 1 - share), axis=1)
    assert weights @ np.exp(grow_capital(courses, share)[:, -1]) == pytest.approx(1)


def test_the_interval_holds_the_truth_at_all_looks_together():
    rng, missed = np.random.default_rng(3), 0
    for _ in range(40):
        values = (rng.random(100) < 0.1).astype(float)
        told = [estimate_mean(values[:n], 0.05) for n in range(20, 101, 20)]
        missed += any(not one.low <= 0.1 <= one.high for one in told)
    assert missed <= 5  # of 40 at .05: more has a probability of .01
    assert estimate_mean(np.array([]), 0.05) is None


def test_a_subject_bets_once_with_what_it_showed_by_its_first_look():
    people, scores = ["a", "b", "a", "c", "a", "a"], [1, 0, 0, 1, 0, 0]
    values, ends = value_subjects(people, scores, 3)
    assert values.tolist() == [0.5, 0, 1]
    assert ends == [2, 3]


def test_a_plan_that_nobody_can_pass_is_known_before_it_starts():
    assert count_needed(Plan(size=20, margin=0.05)) is None
    needed = count_needed(PLAN)
    values, ends = value_subjects([str(n) for n in range(300)], [1.0] * 300, 1)
    assert judge_values(PLAN, values, ends) == ("passed", needed)


def test_a_canary_is_sticky_and_a_larger_weight_takes_no_study_back():
    studies = [f"1.2.840.{number}" for number in range(4000)]
    small = {one for one in studies if takes_canary(one, TASK, "sha256:a", 0.05)}
    large = {one for one in studies if takes_canary(one, TASK, "sha256:a", 0.2)}
    assert small == {one for one in studies if takes_canary(one, TASK, "sha256:a", 0.05)}
    assert small < large
    low, high = proportion_confint(len(small), 4000, 0.001)
    assert low < 0.05 < high
    assert small != {one for one in studies if takes_canary(one, TASK, "sha256:b", 0.05)}
    assert not any(takes_canary(one, TASK, "sha256:a", 0) for one in studies)


@pytest.fixture
def two(ledger, build, acting, author, approver):
    """Version 1 serves everywhere, version 2 is registered."""
    for content in ("one", "two"):
        register(build(content), ledger, TASK, author)
    request(acting(author), TASK, 1)
    approve(acting(approver), TASK, 1)
    return ledger


def see(places, trial, differs=(), subjects=200, **told):
    """Rows of a trial, one image a subject."""
    rows = [Row(trial, f"p{number}", "north", f"s{number}", 1, float(number in differs), True,
                number not in differs, 2.0, 3.0, 1.0, **told) for number in range(subjects)]  # fmt: skip
    open_rows(places.var).append(rows, trial)


def test_a_trial_is_registered_before_its_first_case_and_answers_nobody(two, acting, author):
    event, needed = start_trial(acting(author), TASK, 2, PLAN, ("north",))
    state = two.state(TASK)
    assert event.body["plan"] == {
        "size": 300,
        "margin": 0.05,
        "alpha": 0.05,
        "endpoint": "agreement",
        "look": 10,
    }
    assert {site: (one.placed.version, one.plan) for site, one in state.trials.items()} == {
        "north": (2, PLAN)
    }
    assert state.champions()["north"].version == 1
    assert two.slots(TASK)["north"]["challenger"].version == 2
    assert 70 < needed < 120
    with pytest.raises(Conflict, match="A trial of brain-tissue v2 is on at north"):
        start_trial(acting(author), TASK, 2, PLAN, ("east",))


def test_a_trial_that_cannot_be_is_refused(two, places, acting, author):
    with pytest.raises(RegistryError, match="never differs would not pass with 30"):
        start_trial(acting(author), TASK, 2, Plan(size=30, margin=0.05))
    with pytest.raises(RegistryError, match="masks"):
        start_trial(acting(author), TASK, 2, Plan(size=300, margin=0.1, endpoint="accuracy"))
    with pytest.raises(Conflict, match="cannot challenge"):
        start_trial(acting(author), TASK, 1, PLAN)
    other = read_contract(shelf(places.var, two.version(TASK, 1)[0]))
    changed = other.model_copy(update={"classes": ("background", "lesion"), "positive": ("lesion",)})
    write_contract(changed, shelf(places.var, two.version(TASK, 1)[0]))
    with pytest.raises(RegistryError, match="now answers background, lesion; this version answers"):
        start_trial(acting(author), TASK, 2, PLAN)
    write_contract(other, shelf(places.var, two.version(TASK, 1)[0]))
    suspend(acting(author), TASK, ("east",))
    with pytest.raises(Conflict, match="serves at east"):
        start_trial(acting(author), TASK, 2, PLAN, ("east",))
    retire(acting(author), TASK, 2)
    with pytest.raises(Forbidden, match="retired"):
        start_trial(acting(author), TASK, 2, PLAN)
    assert not two.events(TASK, Decision.TRIAL_STARTED)


@pytest.mark.parametrize("end", ["approved", "rolled back", "retired"])
def test_a_trial_ends_when_the_champion_moves_or_the_version_is_retired(
    two, acting, author, approver, build, end
):
    if end == "rolled back":
        request(acting(author), TASK, 2)
        approve(acting(approver), TASK, 2)
        register(build("three"), two, TASK, author)
        start_trial(acting(author), TASK, 3, PLAN)
        roll_back(acting(author), TASK, ("north",))
        assert set(two.state(TASK).trials) == {"east", "south", "west", "harbour"}
        return
    start_trial(acting(author), TASK, 2, PLAN)
    assert len(two.state(TASK).trials) == 5
    if end == "retired":
        retire(acting(author), TASK, 2)
    else:
        request(acting(author), TASK, 2)
        approve(acting(approver), TASK, 2)
    assert two.state(TASK).trials == {}


def test_a_report_says_what_was_compared_and_names_the_discordant_cases(two, places, acting, author):
    event, _ = start_trial(acting(author), TASK, 2, PLAN)
    see(places, event.seq, differs=(7, 90))
    open_rows(places.var).append([], event.seq, dropped=12)
    told = report_trial(acting(author), TASK)
    assert (told["verdict"], told["running_at"][0]) == ("passed", "north")
    assert "without any truth" in told["compared"]
    assert told["discordant"] == ["p7", "p90"]
    assert told["disagreement"]["estimate"] == pytest.approx(0.01)
    assert told["disagreement"]["high"] < 0.05
    assert told["positives"]["estimate"] == pytest.approx(-0.01)
    assert told["positives"]["low"] < -0.01 < told["positives"]["high"]
    assert (told["accuracy"], told["labelled"], told["dropped"]) == (None, 0, 12)
    assert told["milliseconds"] == {"champion": [2, 2], "challenger": [3, 3], "challenger_cpu": [1, 1]}
    ended, told = end_trial(acting(author), TASK)
    assert (ended.body["verdict"], ended.body["trial"], ended.body["cases"]) == ("passed", event.seq, 200)
    assert two.state(TASK).trials == {}
    with pytest.raises(Conflict, match="No trial"):
        end_trial(acting(author), TASK)


def test_late_truth_decides_where_the_plan_says_so(places):
    rows, plan = open_rows(places.var), Plan(size=300, margin=0.1, endpoint="accuracy")
    see(places, 5, differs=range(0, 200, 4))  # the challenger says no in a quarter
    assert report(plan, rows.read(5), 0)["verdict"] == "running"
    assert rows.tell_truth({f"p{number}": number % 4 > 0 for number in range(200)}) == (200, [])
    assert rows.tell_truth({"p0": True}) == (0, [])  # what was told before stands
    told = report(plan, rows.read(5), 0)
    assert (told["verdict"], told["labelled"]) == ("passed", 200)
    assert told["accuracy"]["estimate"] == pytest.approx(0.25)
    assert told["accuracy"]["low"] > 0
    assert "truth that came later" in told["compared"]


def test_a_truth_told_before_its_case_is_not_kept_and_leaves_the_past_of_a_trial_as_it_was(places):
    rows, plan = open_rows(places.var), Plan(size=300, margin=0.1, endpoint="accuracy")
    assert rows.tell_truth({f"p{number}": True for number in range(40)}) == (0, [f"p{n}" for n in range(40)])
    see(places, 5)
    assert rows.tell_truth({f"p{number}": True for number in range(100, 140)} | {"q": True}) == (40, ["q"])
    before = [row.prediction for row in _decide(plan, rows.read(5))]
    assert rows.tell_truth({f"p{number}": True for number in range(40)})[0] == 40
    assert [row.prediction for row in _decide(plan, rows.read(5))][:40] == before


@pytest.mark.parametrize(("east", "where"), [(29, ["north"]), (30, ["north", "east"])])
def test_a_trial_is_passed_at_the_sites_that_had_a_part_in_its_verdict(
    two, places, acting, author, east, where
):
    start_trial(acting(author), TASK, 2, PLAN)
    end_trial(acting(author), TASK)
    event, _ = start_trial(acting(author), TASK, 2, PLAN)
    rows = open_rows(places.var)
    rows.append([Row(event.seq, f"e{n}", "east", f"s{n}", 1, 0.0, True, True, 2.0) for n in range(east)],
                event.seq)  # fmt: skip
    see(places, event.seq, subjects=81)
    late = [Row(event.seq, f"w{n}", "west", f"s{n}", 1, 1.0, True, False, 2.0) for n in range(40)]
    rows.append(late, event.seq)  # the verdict was there before these
    told = report_trial(acting(author), TASK)
    ended, _ = end_trial(acting(author), TASK)
    assert (told["verdict"], told["earlier_trials"], told["needed_at_a_site"]) == ("passed", 1, 30)
    assert ended.body["earlier_trials"] == 1
    assert ended.body["deciding"] == told["deciding"]
    assert told["deciding"]["east"] == east
    assert sorted(two.state(TASK).passed) == sorted(where)


def test_failures_count_against_the_challenger_and_cases_of_nobody_decide_nothing(places):
    rows = open_rows(places.var)
    see(places, 6, differs=range(60), subjects=60, failure="NotFinite")
    rows.append([Row(6, f"q{n}", "north", None, 1, 0.0, True, True, 1.0) for n in range(500)], 6)
    told = report(PLAN, rows.read(6), 0)
    assert (told["verdict"], told["failures"], told["without_subject"]) == ("failed", {"NotFinite": 60}, 500)
    assert told["subjects"] == 60


def test_rows_are_append_only_and_a_case_counts_once(places):
    rows = open_rows(places.var)
    see(places, 7, subjects=3)
    see(places, 7, subjects=3, differs=(0, 1, 2))
    assert [row.difference for row in rows.read(7)] == [0, 0, 0]
    for change in ("DELETE FROM cases", "UPDATE truths SET positive = 1", "UPDATE cases SET difference = 1"):
        if "truths" in change:
            rows.tell_truth({"p0": False})
        with pytest.raises((RegistryError, DatabaseError), match="append-only"), rows._engine.begin() as one:
            one.execute(text(change))


@pytest.fixture
def passed(two, places, acting, author):
    """Version 2 has passed a trial at north and was asked for."""
    event, _ = start_trial(acting(author), TASK, 2, PLAN, ("north",))
    see(places, event.seq)
    end_trial(acting(author), TASK)
    request(acting(author), TASK, 2)
    return two


def weights(ledger):
    return {site: (one.placed.version, one.weight) for site, one in ledger.state(TASK).canaries.items()}


def test_a_canary_answers_only_where_it_passed_its_trial_and_a_second_person_agreed(
    passed, acting, author, approver
):
    with pytest.raises(Forbidden, match="made or asked for"):
        set_canary(acting(author), TASK, 2, 0.05)
    with pytest.raises(Forbidden, match="passed no trial against what serves at"):
        set_canary(acting(approver), TASK, 2, 0.05, ("east",))
    assert set_canary(acting(approver), TASK, 2, 0.05) == ["north"]
    assert weights(passed) == {"north": (2, 0.05)}
    set_canary(acting(approver), TASK, 2, 0.2)
    assert weights(passed) == {"north": (2, 0.2)}
    assert passed.state(TASK).champions()["north"].version == 1
    assert set_canary(acting(author), TASK, 2, 0) == ["north"]  # whoever made it may end it
    assert weights(passed) == {}
    with pytest.raises(Conflict, match="canary at no site"):
        set_canary(acting(author), TASK, 2, 0)


@pytest.mark.parametrize("end", ["approved", "rejected", "retired"])
def test_a_canary_ends_with_the_request_that_it_rests_on(passed, acting, author, approver, end):
    set_canary(acting(approver), TASK, 2, 0.05)
    {"approved": lambda: approve(acting(approver), TASK, 2, ("east",)),
     "rejected": lambda: reject(acting(approver), TASK, 2),
     "retired": lambda: retire(acting(author), TASK, 2)}[end]()  # fmt: skip
    assert weights(passed) == {}


def test_without_a_trial_or_after_one_that_was_not_passed_there_is_no_canary(
    two, places, acting, author, approver
):
    request(acting(author), TASK, 2)
    with pytest.raises(Forbidden, match="passed no trial"):
        set_canary(acting(approver), TASK, 2, 0.05)
    event, _ = start_trial(acting(author), TASK, 2, PLAN)
    see(places, event.seq, subjects=20)
    assert end_trial(acting(author), TASK)[0].body["verdict"] == "undecided"
    with pytest.raises(Forbidden, match="passed no trial"):
        set_canary(acting(approver), TASK, 2, 0.05)


def test_a_canary_that_the_asker_wrote_past_the_commands_answers_nobody(passed, author):
    state = passed.state(TASK)
    body = {"version": 2, "digest": state.open[2].body["digest"], "asked": state.open[2].seq,
            "sites": ["north"], "weight": 0.5, "because": "me"}  # fmt: skip
    with passed.writing() as writer:
        writer.append(Decision.CANARY_SET, TASK, body, author)
    assert weights(passed) == {}


def test_actions_take_a_plan_and_a_weight(two, acting, author):
    action = ACTIONS["trial"]
    asked = action.arguments(task=TASK, version=2, size="300", margin="0.05", because="A test.")
    told = perform(action, acting(author), asked)
    assert told["sites"] == ["north", "east", "south", "west", "harbour"]
    assert f"passes after {told['needed']} subjects" in told["told"]
    with pytest.raises(ValueError, match="less than or equal to"):
        ACTIONS["canary"].arguments(task=TASK, version=2, weight=0.6, because="A test.")
    assert "$ref" not in str(action.arguments.model_json_schema())
