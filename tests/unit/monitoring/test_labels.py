"""Late truths come through one door: named when wrong, kept once, never of a locked test set."""

import json
import uuid
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from sqlalchemy import event

from imaging.errors import DataError, UnknownPrediction, WrongLabel
from imaging.vocabulary import Judged, Kind
from monitoring import labels
from monitoring.accuracy_commands import labels as command
from monitoring.journal import Prediction, open_journal, pseudonym
from monitoring.label_files import import_labels
from monitoring.labels import Door, Judgement, read_labels
from monitoring.records import Assessment, open_records
from monitoring.site_exports import export_statistics
from registry.access import admit
from registry.ledger import open_ledger
from registry.package import digest_package, write_contract
from registry.registration import register
from registry.trials.rows import Row, open_rows
from tests.tiny import promise
from tests.tiny_registry import TASK, make_places, write_stages

LOCKED_IMAGE, LOCKED_SUBJECT = "a" * 64, "north-0007"


def write_version(places, content, kind=Kind.CLASSIFICATION, subject=LOCKED_SUBJECT):
    """Register a package whose locked set is one image; its digest."""
    write_stages(places, content)
    package, evaluated = places.stage(TASK, "package"), places.stage(TASK, "evaluate") / "evaluation.json"
    classes = ("none", "disc") if kind is not Kind.SEGMENTATION else ("background", "disc")
    write_contract(promise(kind, classes, task=TASK, title=content), package)
    digest = digest_package(package)
    rows = [{"sha256": LOCKED_IMAGE, "subject": subject, "site": "north", "split": "test", "probability": 0.5,
             "truth": 1}]  # fmt: skip
    body = json.loads(evaluated.read_text()) | {"package": digest, "predictions": rows}
    body["sets"] = {"test": {"digest": "sha256:test", "images": 1, "subjects": 1}}
    evaluated.write_text(json.dumps(body))
    for stage, name in (("qualify", "qualification.json"), ("reference", "alarms.json")):
        path = places.stage(TASK, stage) / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"package": digest}))
    ledger = open_ledger(places.var)
    register(places, ledger, TASK, admit(places.var, ledger, "author@test"))
    return digest


@pytest.fixture
def places(tmp_path):
    return make_places(tmp_path)


@pytest.fixture
def digest(places):
    return write_version(places, "one")


@pytest.fixture
def records(places, digest):
    return open_records(places.var)


@pytest.fixture
def door(places, records):
    return Door(places, open_journal(places.var), records)


@pytest.fixture
def answer(places, digest):
    """Put one answer into the journal; its id."""

    def put(probability=0.9, site="north", package=digest, **told):
        columns = told.pop("columns", {}) | ({} if probability is None else {"probability": probability})
        usual = {"id": str(uuid.uuid4()), "request_id": "r", "task": TASK, "site": site, "version": 1,
                 "package": package, "engine": "e", "subject": "5" * 64, "image": "2" * 64,
                 "columns": columns, "stages_ms": {}}  # fmt: skip
        row = Prediction(**{**usual, **told})
        open_journal(places.var).append([row])
        return row.id

    return put


def judge(door, number, verdict, **told):
    return door.keep("north", [Judgement(number, Judged(verdict), **told)])


@pytest.mark.parametrize(
    ("probability", "verdict", "given", "truth"),
    [(0.9, "accepted", None, 1), (0.1, "accepted", None, 0), (0.9, "rejected", None, 0),
     (0.1, "rejected", None, 1), (0.5, "accepted", None, 1), (0.9, "corrected", 0, 0),
     (0.9, "accepted", 1, 1), (0.2, "labelled", 1, 1)],
)  # fmt: skip
def test_a_verdict_carries_the_truth_that_follows_from_the_answer(
    door, records, answer, probability, verdict, given, truth
):
    (kept,), new = judge(door, answer(probability), verdict, truth=given)
    assert (new, kept.truth, kept.verdict) == (1, truth, verdict)
    assert records.read(Assessment) == [kept]


def test_the_sites_own_threshold_decides_what_was_answered(door, answer):
    (kept,), _ = judge(door, answer(0.4, columns={"threshold": 0.3}), "accepted")
    assert kept.truth == 1
    (kept,), _ = judge(door, answer(0.4, columns={"threshold": 0.3, "abstained": 1.0}), "accepted")
    assert kept.truth is None


@pytest.mark.parametrize(
    ("verdict", "truth"), [("accepted", 0), ("rejected", 1), ("labelled", None), ("corrected", None)]
)
def test_a_truth_that_contradicts_the_verdict_or_lacks_is_refused(door, records, answer, verdict, truth):
    with pytest.raises(WrongLabel):
        judge(door, answer(0.9), verdict, truth=truth)
    assert records.read(Assessment) == []


def test_a_mask_is_judged_but_has_no_truth(places, door, answer):
    masks = write_version(places, "masks", Kind.SEGMENTATION)
    (kept,), _ = judge(door, answer(None, package=masks), "rejected", reason="Too wide.")
    assert (kept.truth, kept.reason) == (None, "Too wide.")
    assert judge(door, answer(None, package=masks), "corrected")[1] == 1
    with pytest.raises(WrongLabel, match="no truth is 0 or 1"):
        judge(door, answer(None, package=masks), "corrected", truth=1)


def test_the_same_judgement_again_is_not_kept_again_and_another_one_is(door, records, answer):
    number = answer(0.9)
    first = judge(door, number, "accepted", reader="Dr. Grey", reason="Seen.")
    assert judge(door, number, "accepted", reader="Dr. Grey", reason="Seen.") == (first[0], 0)
    assert judge(door, number, "rejected", reader="Dr. Grey")[1] == 1
    assert judge(door, number, "accepted", reader="Dr. Grey", reason="Seen.")[1] == 1
    assert judge(door, number, "accepted", reader="Dr. Brown", reason="Seen.")[1] == 1
    assert len(records.read(Assessment)) == 4


def test_a_reader_is_kept_as_the_sites_pseudonym(places, door, answer):
    (kept,), _ = judge(door, answer(), "accepted", reader="Dr. Grey")
    assert kept.reader == pseudonym(places.var, "north", "reader Dr. Grey")
    assert b"Grey" not in (places.var / "journal.db").read_bytes()
    assert b"Grey" not in (places.var / "journal.db-wal").read_bytes()


def test_another_site_has_no_such_answer(door, answer):
    for number in (answer(site="east"), "nothing"):
        with pytest.raises(UnknownPrediction):
            judge(door, number, "accepted")
        with pytest.raises(UnknownPrediction):
            door.list_judgements("north", number)


def test_a_locked_image_and_a_locked_subject_take_no_label_whatever_version_locked_them(places, door, answer):
    write_version(places, "two", subject="north-0008")
    for subject in ("north-0007", "north-0008"):
        locked = answer(subject=pseudonym(places.var, "north", subject))
        with pytest.raises(WrongLabel, match="locked test set"):
            judge(door, locked, "accepted")
    with pytest.raises(WrongLabel, match="locked test set"):
        judge(door, answer(image=LOCKED_IMAGE), "labelled", truth=1)
    assert judge(door, answer(subject=pseudonym(places.var, "north", "north-0009")), "accepted")[1] == 1


def test_the_newest_label_of_an_answer_stands_before_what_readers_say(door, records, answer):
    first, second, unsure = answer(0.9), answer(0.2), answer(0.9, columns={"abstained": 1.0})
    judge(door, second, "accepted")
    judge(door, first, "labelled", truth=1, source="csv")
    judge(door, first, "labelled", truth=0, source="csv")
    judge(door, unsure, "labelled", truth=0)
    told = [(first, 0.9, 0), (second, 0.2, 0), (unsure, 0.9, 0)]
    judge(door, first, "accepted", reader="Dr. Grey")
    judge(door, unsure, "accepted")  # of an answer that decided nothing no truth follows
    assert judge(door, first, "labelled", truth=0, source="csv")[1] == 0
    records.append([Assessment(task=TASK, site="north", version=1, prediction=one, source="http",
                               verdict="corrected") for one in (first, second)])  # fmt: skip
    rows = read_labels(records, TASK, "north", 1)
    assert [(row["prediction"], row["probability"], row["truth"]) for row in rows] == told
    judge(door, second, "rejected")
    judge(door, first, "labelled", truth=1)
    assert [row["truth"] for row in read_labels(records, TASK, "north", 1)] == [1, 1, 0]
    assert read_labels(records, TASK, "north", 2) == read_labels(records, TASK, "east", 1) == []


def test_answers_wait_for_as_few_statements_whatever_a_file_holds(door, records, answer, tmp_path):
    def hold(count):
        held, path = [], write_csv(tmp_path / "labels.csv", *(f"{answer()},1" for _ in range(count)))

        def note(connection, _, statement, *told):
            if connection.get_execution_options().get("writing"):
                held.append((statement, told[-1]))  # and whether it runs once a row

        event.listen(records.engine, "before_cursor_execute", note)
        assert import_labels(door, path, "north") == (count, count)
        event.remove(records.engine, "before_cursor_execute", note)
        return held

    few = hold(2)
    assert few == hold(20)
    assert "INSERT INTO assessments" in str(few)
    assert not any(many for _, many in few)


def test_what_is_said_meanwhile_is_neither_kept_twice_nor_one_too_many(door, records, answer, monkeypatch):
    def interrupt(*told, sort_out=labels._sort_out):
        found = sort_out(*told)
        if said:
            door.keep("north", [said.pop()])
        return found

    monkeypatch.setattr(labels, "_sort_out", interrupt)
    number = answer()
    said = [Judgement(number, Judged.LABELLED, 1)]
    assert judge(door, number, "labelled", truth=1) == (records.read(Assessment), 0)
    records.append(records.read(Assessment) * 98)
    said = [Judgement(number, Judged.ACCEPTED)]
    with pytest.raises(WrongLabel, match="has 100 assessments"):
        judge(door, number, "rejected")
    assert len(records.read(Assessment)) == 100


def test_truths_reach_silent_trials_by_the_same_door(places, door, answer):
    number, rows = answer(0.9), open_rows(places.var)
    rows.append([Row(1, number, "north", "s", 1, 0.0, True, True, 1.0)], 1)
    judge(door, number, "rejected")
    assert [row.truth for row in rows.read(1)] == [False]


def write_csv(path, *lines, head="prediction,truth"):
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def test_a_file_is_kept_whole_once_and_a_dry_run_keeps_nothing(door, records, answer, tmp_path):
    path = write_csv(tmp_path / "labels.csv", *(f"{answer()},{number % 2},Seen late." for number in range(6)),
                     head="prediction,truth,reason")  # fmt: skip
    truths = {line.split(",")[0]: number % 2 for number, line in enumerate(path.read_text().splitlines()[1:])}
    assert import_labels(door, path, "north", dry_run=True) == (6, 6)
    assert records.read(Assessment) == []
    assert import_labels(door, path, "north") == (6, 6)
    assert import_labels(door, path, "north") == (6, 0)
    kept = records.read(Assessment)
    assert {row.prediction: row.truth for row in kept} == truths
    assert len(kept) == 6
    assert {(row.verdict, row.source, row.reason) for row in kept} == {("labelled", "csv", "Seen late.")}


def test_every_wrong_row_is_named_and_nothing_is_kept(door, records, answer, tmp_path):
    good = answer()
    lines = [f"{good},1", f"{answer()},2", "unknown,1", f"{answer(site='east')},0", f"{answer()},1,more",
             f"{good},0", f"{answer(image=LOCKED_IMAGE)},1", f"{answer()}"]  # fmt: skip
    with pytest.raises(DataError) as refused:
        import_labels(door, write_csv(tmp_path / "labels.csv", *lines), "north")
    assert refused.value.fact.startswith("7 rows of labels.csv are wrong")
    assert all(f"line {number}:" in refused.value.fact for number in range(3, 10))
    assert records.read(Assessment) == []


@pytest.mark.parametrize(
    "head", ["prediction,positive", "prediction", "prediction,truth,name", "truth,truth"]
)
def test_other_columns_are_refused(door, tmp_path, head):
    with pytest.raises(DataError, match="Columns: prediction, truth"):
        import_labels(door, write_csv(tmp_path / "labels.csv", "1,1", head=head), "north")


def test_the_command_says_how_many_are_new(places, door, answer, tmp_path, monkeypatch):
    monkeypatch.setenv("FORMULARY_ROOT", str(places.root))
    monkeypatch.setenv("FORMULARY_VAR", str(places.var))
    path = write_csv(tmp_path / "labels.csv", f"{answer()},1")
    for options, told in ((["--dry-run"], "1 labels, 1 of them new; nothing was kept."),
                          ([], "1 labels, 1 of them new."), ([], "1 labels, 0 of them new.")):  # fmt: skip
        result = CliRunner().invoke(command, [str(path), "--site", "north", *options], catch_exceptions=False)
        assert result.output.strip() == told


def test_a_recalibrated_sites_calibration_is_that_of_what_it_was_answered(places, door, answer, tmp_path):
    """The network says 2 logits too much, and the site's profile takes them away."""
    for number, score in enumerate(np.linspace(0.05, 0.95, 400)):
        told = {"raw_probability": float(1 / (1 + (1 - score) / score * np.exp(-2.0))), "threshold": 0.5}
        truth = int(number * 0.618034 % 1 < score)
        one = answer(float(score), subject=f"{number:064x}", columns=told)
        door.keep("north", [Judgement(one, Judged.LABELLED, truth)])
    told = export_statistics(places, open_ledger(places.var), (TASK, 1, "north"), tmp_path / "north.json")
    assert told.withheld == {}
    assert abs(told.in_the_large.hits / 400) < 0.02
    assert told.line.intercept[1] < 0 < told.line.intercept[2]


def test_a_site_exports_sums_of_its_labelled_answers_and_no_row(places, door, answer, tmp_path):
    rows = [(number / 160, int(number % 3 == 0)) for number in range(160)]
    numbers = [answer(score, subject=f"{number:064x}") for number, (score, _) in enumerate(rows)]
    told = [
        Judgement(number, Judged.LABELLED, truth) for number, (_, truth) in zip(numbers, rows, strict=True)
    ]
    door.keep("north", told)
    export = partial(export_statistics, places, open_ledger(places.var), (TASK, 1, "north"))
    kept = export(tmp_path / "north.json")
    right = sum((score >= 0.5) == truth for score, truth in rows)
    assert (kept.accuracy.hits, kept.accuracy.cases, kept.source) == (right, 160, "live")
    text = (tmp_path / "north.json").read_text()
    assert not any(number in text for number in numbers)
    door.keep("north", [Judgement(answer(0.9, subject="f" * 64), Judged.LABELLED, 0)])
    with pytest.raises(DataError, match="fewer than ten cases"):
        export(tmp_path / "later.json")
    assert not (tmp_path / "later.json").exists()
    with pytest.raises(DataError, match="no labelled case"):
        export_statistics(places, open_ledger(places.var), (TASK, 1, "east"), tmp_path / "east.json")
    export(tmp_path / "all.json", locked=True)  # one image: everything is withheld
    assert json.loads((tmp_path / "all.json").read_text())["accuracy"] is None
