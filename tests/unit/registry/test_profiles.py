"""A site's own settings of a package: one person makes them, another stores them, there and only there."""

import json
from dataclasses import replace

import click
import numpy as np
import pytest

from imaging.errors import Conflict, DataError, Forbidden, RegistryError, TrustError, Unreadable
from registry.access import admit
from registry.actions import ACTIONS, perform
from registry.custody import back_up, restore
from registry.decision_commands import make_commands
from registry.decisions import roll_back
from registry.ledger import open_ledger
from registry.profiles import (
    Abstention,
    Draft,
    SiteProfile,
    drop_profile,
    find_numbered,
    read_draft,
    store_profile,
    write_draft,
)
from registry.promotion import approve, request
from registry.registration import register

TASK = "brain-tissue"
ABSTENTION = {"alpha": 0.1, "positive_from": 0.3, "negative_to": 0.6, "positives": 60, "negatives": 70}


@pytest.fixture
def promoted(ledger, build, acting, author, approver):
    def promote(content):
        made = register(build(content), ledger, TASK, author)
        request(acting(author), TASK, made.version)
        approve(acting(approver), TASK, made.version)
        return made

    return promote


@pytest.fixture
def draft(ledger, author):
    """A draft for the first version that its author signed; what is not said does not matter."""

    def make(version=1, **told):
        profile = SiteProfile(**{"site": "north", "threshold": 0.4, **told})
        digest = ledger.version(TASK, version)[0]
        return Draft(TASK, version, digest, profile, {"rows": "sha256:1", "subjects": 82}).sign(author)

    return make


def held(ledger, site="north"):
    state = ledger.state(TASK)
    return state.profiles.get(site, {}).get(state.trail[site][-1].digest)


def test_a_stored_profile_belongs_to_its_site_and_keeps_its_evidence(
    ledger, promoted, draft, acting, approver
):
    promoted("one")
    event = store_profile(acting(approver), TASK, draft())
    assert held(ledger) == SiteProfile(number=1, site="north", threshold=0.4)
    assert held(ledger, "east") is None
    assert event.body["evidence"] == {"rows": "sha256:1", "subjects": 82}
    assert (event.body["by"], event.actor) == ("author@test", "approver@test")
    assert ledger.verify() == ledger.generation()


def test_a_later_profile_takes_its_place_and_the_first_one_can_still_be_found(
    ledger, promoted, draft, acting, approver
):
    promoted("one")
    for threshold in (0.4, 0.3):
        store_profile(acting(approver), TASK, draft(threshold=threshold))
    assert held(ledger) == SiteProfile(number=2, site="north", threshold=0.3)
    assert find_numbered(ledger.signed(), TASK, "north", 1).threshold == 0.4
    with pytest.raises(DataError, match="no profile 3 of brain-tissue at north"):
        find_numbered(ledger.signed(), TASK, "north", 3)


def test_a_profile_may_be_taken_back(ledger, promoted, draft, acting, approver):
    promoted("one")
    store_profile(acting(approver), TASK, draft())
    with pytest.raises(RegistryError, match="has a profile at"):
        drop_profile(acting(approver), TASK, ("east",))
    assert drop_profile(acting(approver), TASK, ()) == ["north"]
    assert held(ledger) is None
    store_profile(acting(approver), TASK, draft())
    assert held(ledger).number == 3


def test_another_package_has_no_profile_and_the_old_one_finds_its_own_again(
    ledger, promoted, draft, acting, author, approver
):
    promoted("one")
    store_profile(acting(approver), TASK, draft())
    promoted("two")
    assert held(ledger) is None
    with pytest.raises(Conflict, match="no champion of brain-tissue at north"):
        store_profile(acting(approver), TASK, draft())
    roll_back(acting(author), TASK, ("north",))
    assert held(ledger).number == 1


def test_who_made_a_profile_does_not_store_it(ledger, promoted, draft, acting, author):
    promoted("one")
    with pytest.raises(Forbidden, match="author@test made this profile"):
        store_profile(acting(author), TASK, draft())
    assert held(ledger) is None


def test_a_record_that_its_maker_wrote_alone_changes_nothing(ledger, promoted, draft, author):
    promoted("one")
    told = draft().describe()
    body = {**told, "sites": ["north"], "number": 1, "because": "alone"}
    with ledger.writing() as writer:
        writer.append("profiled", TASK, body, author)
    assert held(ledger) is None


@pytest.mark.parametrize(
    "forged",
    [{"by": "somebody@test"}, {"evidence": {"subjects": 8200}}, {"profile": SiteProfile(site="east")}],
    ids=["another maker", "other evidence", "another site"],
)
def test_a_draft_that_was_changed_after_it_was_signed_is_refused(promoted, draft, acting, approver, forged):
    promoted("one")
    with pytest.raises(TrustError, match="signed this draft as it is"):
        store_profile(acting(approver), TASK, replace(draft(), **forged))


def test_a_draft_by_a_key_that_nobody_trusts_is_refused(
    places, ledger, promoted, draft, acting, approver, tmp_path
):
    promoted("one")
    stranger = admit(tmp_path / "elsewhere", open_ledger(tmp_path / "elsewhere"), "stranger@test")
    with pytest.raises(TrustError):
        store_profile(acting(approver), TASK, draft().sign(stranger))


def test_a_draft_is_stored_by_its_name_as_command_and_call_do(places, promoted, draft, acting, approver):
    promoted("one")
    write_draft(draft(abstention=ABSTENTION), places.var / "profiles" / "north.json")
    action = ACTIONS["profile"]
    asked = action.arguments(task=TASK, draft="north.json", because="Read with the site.")
    told = perform(action, acting(approver), asked)
    assert (told["site"], told["number"]) == ("north", 1)
    with pytest.raises(ValueError, match="pattern"):
        action.arguments(task=TASK, draft="../keys/author@test.pem", because="No.")


def test_a_file_that_is_no_draft_says_how_to_make_one(tmp_path, draft, promoted):
    promoted("one")
    path = tmp_path / "draft.json"
    with pytest.raises(Unreadable, match="formulary monitoring accept"):
        read_draft(path)
    write_draft(draft(), path)
    told = json.loads(path.read_text())
    told["profile"]["slope"] = 0
    path.write_text(json.dumps(told))
    with pytest.raises(Unreadable, match="slope"):
        read_draft(path)


def test_a_backup_holds_profiles(places, ledger, promoted, draft, acting, approver, tmp_path):
    promoted("one")
    store_profile(acting(approver), TASK, draft(abstention=ABSTENTION))
    backup = back_up(acting(approver))
    fresh = replace(places, var=tmp_path / "elsewhere")
    fresh.var.mkdir()
    other = open_ledger(fresh.var)
    restore(fresh, other, backup)
    assert other.verify() == ledger.generation()
    assert held(other) == held(ledger)


def test_recalibration_is_the_logistic_curve_and_nothing_changes_nothing():
    scores = np.array([0.0, 0.1, 0.5, 0.731058578630005, 1.0])
    same = SiteProfile(site="north").recalibrate(scores)
    assert same.tobytes() == scores.tobytes()
    told = SiteProfile(site="north", intercept=-1.0, slope=2.0).recalibrate(scores)
    # By hand: logit(.5) = 0 gives 1 / (1 + e) and logit(.7310...) = 1 gives 1 / (1 + 1 / e).
    assert told[2] == pytest.approx(1 / (1 + np.e))
    assert told[3] == pytest.approx(1 / (1 + np.exp(-1)))
    assert (np.diff(told) > 0).all()


def test_a_probability_between_the_thresholds_has_both_classes_or_none():
    both, none = (
        Abstention(**ABSTENTION),
        Abstention(**{**ABSTENTION, "positive_from": 0.6, "negative_to": 0.3}),
    )
    assert [both.name(p, p >= 0.5) for p in (0.2, 0.3, 0.6, 0.7)] == [
        ["negative"], ["negative", "positive"], ["negative", "positive"], ["positive"]]  # fmt: skip
    assert [none.name(p, p >= 0.5) for p in (0.3, 0.45, 0.6)] == [["negative"], [], ["positive"]]
    told = SiteProfile(site="north", number=4, abstention=none).tell(0.45, False)
    assert told["positive"] is None
    assert (told["abstained"], told["profile"]) == (True, 4)
    assert "90 %" in told["guarantee"]
    assert "60 positive and 70 negative subjects of north" in told["guarantee"]


@pytest.mark.parametrize("limits", [(0.3, 0.6), (0.6, 0.3)])
def test_an_answer_that_its_one_class_contradicts_abstains_on_either_side_of_the_limits(limits):
    named = Abstention(**{**ABSTENTION, "positive_from": limits[0], "negative_to": limits[1]})
    profile = SiteProfile(site="north", abstention=named)
    for p, positive, agrees in (
        (0.25, True, False),  # a threshold of .2, below both limits
        (0.25, False, True),
        (0.7, False, False),  # a threshold of .8, above both
        (0.7, True, True),
    ):
        told = profile.tell(p, positive)
        alone = ["positive" if positive else "negative"]
        assert told["prediction_set"] == (alone if agrees else ["negative", "positive"])
        assert ("positive" in told, told["abstained"]) == (not agrees, not agrees)
        assert profile.note(p, positive)["abstained"] == float(not agrees)


def test_fewer_than_fifty_calibration_subjects_a_class_are_no_abstention():
    with pytest.raises(ValueError, match="positives"):
        Abstention(**{**ABSTENTION, "positives": 49})


def test_the_command_takes_task_and_draft_as_the_call_does():
    (command,) = (one for one in make_commands() if one.name == "profile")
    assert [one.name for one in command.params if isinstance(one, click.Argument)] == ["task", "draft"]
