"""A scrape is readable, complete, and grows with the configuration and never with the traffic."""

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imaging.greedy import GreedyWorker
from monitoring import telemetry
from monitoring.gauges import Serving
from monitoring.journal import VerdictRow
from monitoring.telemetry import exposition
from tests.tiny_state import ESTIMATE, write_state

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
LABELS = {"hash", "task", "site", "outcome", "reason", "stage", "le", "part", "measure", "bound"}
SERVING = {("brain", "north"): 3}


def commit_in_groups(journal):
    """A writer whose groups are what waited, as the gateway's."""

    def commit(rows):
        journal.append(rows)
        return [None] * len(rows)

    return GreedyWorker("journal", commit, 256)


def verdict(site, said, age_s=0.0):
    at = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
    return VerdictRow(at, "brain", site, 3, 5, 200, said, "", 0.002, {}, "")


def scrape(journal, serving=SERVING):
    text, _ = exposition(journal, Serving(serving))
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def values(family):
    return {(sample.labels["task"], sample.labels["site"]): sample.value for sample in family.samples}


def test_every_metric_of_the_page_is_in_a_scrape_with_its_type(journal):
    journal.write_verdict(verdict("north", "drift"))
    told = {name: family.type for name, family in scrape(journal).items() if not name.endswith("_created")}
    assert told == dict(re.findall(r"^\| `(formulary_\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE))


def test_the_content_type_is_that_of_the_text_format(journal):
    assert exposition(journal, Serving({}))[1].startswith("text/plain; version=")


def test_what_serves_and_the_newest_verdicts_are_told_as_they_are_now(journal):
    for row in (verdict("north", "drift"), verdict("north", "in bounds", 90), verdict("east", "drift"),
                verdict("west", "not enough cases")):  # fmt: skip
        journal.write_verdict(row)
    told = scrape(journal)
    assert values(told["formulary_serving_version"]) == {("brain", "north"): 3}
    expected = {("brain", "north"): 0, ("brain", "east"): 1, ("brain", "west"): -1}
    assert values(told["formulary_drift"]) == expected
    assert values(told["formulary_drift_age_seconds"])["brain", "north"] == pytest.approx(90, abs=30)
    assert values(scrape(journal, {})["formulary_serving_version"]) == {}


def test_a_scrape_grows_with_the_places_and_not_with_the_traffic(journal, predict):
    def series():
        return {(sample.name, *sample.labels.items()) for family in scrape(journal).values()
                for sample in family.samples}  # fmt: skip

    journal.write_verdict(verdict("north", "drift"))
    before, worker = series(), commit_in_groups(journal)
    rows = [predict(subject=f"subject-{number}", request_id=f"asked-{number}") for number in range(50)]
    for future in [worker.submit(row) for row in rows]:
        future.result(timeout=10)
    journal.write_verdict(verdict("north", "in bounds"))
    assert series() == before
    text = exposition(journal, Serving(SERVING))[0].decode()
    assert not [row for row in rows if row.id in text or row.request_id in text or row.subject in text]


def test_labels_are_of_the_few_that_are_bounded(journal):
    journal.write_verdict(verdict("north", "drift"))
    telemetry.REQUESTS.labels("other", "other", "not-approved")
    telemetry.STAGE.labels("other", "engine")
    write_state(journal, [("brain", "north")])
    samples = [sample for family in scrape(journal).values() for sample in family.samples]
    assert {label for sample in samples for label in sample.labels} <= LABELS


def test_a_group_is_counted_by_its_rows_and_its_commits_are_timed(journal, predict):
    before, worker = scrape(journal), commit_in_groups(journal)
    for _ in range(3):
        worker.submit(predict()).result(timeout=10)
    worker.close()
    after = scrape(journal)

    def grown(family, sample):
        old, new = ({s.name: s.value for s in told[family].samples}[sample] for told in (before, after))
        return new - old

    assert grown("formulary_journal_rows", "formulary_journal_rows_total") == 3
    assert grown("formulary_journal_commit_seconds", "formulary_journal_commit_seconds_count") == 3
    assert 0 < grown("formulary_journal_commit_seconds", "formulary_journal_commit_seconds_sum") < 3


def test_what_the_monitor_wrote_is_told_as_it_stands(journal, predict):
    journal.append([predict(), predict(), predict()])
    write_state(journal, [("brain", "north")], last=2)
    told = scrape(journal, {("brain", "north"): 1})
    accuracy = {(s.labels["measure"], s.labels["bound"]): s.value
                for s in told["formulary_accuracy_estimated"].samples}  # fmt: skip
    assert accuracy == {(measure, bound): value for measure in ("accuracy", "sensitivity", "specificity")
                        for bound, value in ESTIMATE["estimated"][measure].items()}  # fmt: skip
    assert len(told["formulary_accuracy_realised"].samples) == 3
    assert values(told["formulary_accuracy_verdict"]) == {("brain", "north"): 0}
    assert values(told["formulary_combined_score"]) == {("brain", "north"): 1.5}
    assert 0 <= values(told["formulary_site_idle_seconds"])["brain", "north"] < 30
    single = {name: told[name].samples[0].value for name in told
              if name.startswith(("formulary_monitor", "formulary_journal_"))
              and told[name].type == "gauge"}  # fmt: skip
    assert single["formulary_monitor_lag_rows"] == 1
    assert 0 <= single["formulary_monitor_pass_age_seconds"] < 30
    assert single["formulary_journal_bytes"] > 50_000
    assert single["formulary_journal_up"] == 1


def test_the_version_that_serves_is_told_whatever_a_canary_answers_beside_it(journal, predict):
    journal.append([predict(), predict()])
    write_state(journal, [("brain", "north")], last=1)
    with journal.engine.connect() as connection:
        connection.exec_driver_sql(
            "INSERT INTO streams VALUES "
            "('brain', 'north', 2, 1, 2, '{\"combined\": {\"score\": 7, \"enough\": true}}', x''), "
            "('brain', 'east', 1, 0, 0, '{\"combined\": {\"score\": 0, \"enough\": false}}', x'')"
        )
        connection.commit()
    place = ("brain", "north")
    for serving, score, verdict in (({place: 1}, {place: 1.5}, {place: 0}), ({place: 2}, {place: 7}, {}),
                                    ({place: 3}, {}, {}), ({}, {place: 7}, {place: 0})):  # fmt: skip
        told = scrape(journal, serving)  # of no version that is known to serve, the newest
        assert values(told["formulary_combined_score"]) == score
        assert values(told["formulary_accuracy_verdict"]) == verdict
    for serving in ({place: 1}, {place: 3}, {}):  # a site that fell silent is told whatever serves there now
        idle = scrape(journal, serving)["formulary_site_idle_seconds"]
        assert set(values(idle)) == {place}  # east was never asked


def test_open_alarms_are_told_by_what_is_watched_and_unknown_words_do_not_become_labels(journal):
    told = Serving(SERVING, suspended=frozenset([("brain", "east")]),
                   alarms={("brain", "north", "pixels"): 2, ("brain", "north", "anything"): 1})  # fmt: skip
    text, _ = exposition(journal, told)
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    assert values(families["formulary_suspended"]) == {("brain", "east"): 1}
    alarms = {sample.labels["part"]: sample.value for sample in families["formulary_open_alarms"].samples}
    assert alarms == {"pixels": 2, "other": 1}


def test_a_label_is_read_back_as_it_was_whatever_it_contains(journal):
    place = ('a "quoted" task', "back\\slash\nand line")
    assert values(scrape(journal, {place: 1})["formulary_serving_version"]) == {place: 1}


def test_a_journal_that_cannot_be_read_is_said_and_what_serves_is_told_all_the_same(journal, tmp_path):
    write_state(journal, [("brain", "north")])
    with journal.engine.connect() as connection:
        connection.exec_driver_sql("DROP TABLE verdicts")
        connection.commit()
    told = scrape(journal)
    assert told["formulary_journal_up"].samples[0].value == 0
    assert values(told["formulary_serving_version"]) == {("brain", "north"): 3}
    assert "formulary_drift" not in told
    assert "formulary_combined_score" not in told


def test_a_scrape_of_a_thousand_places_is_quick(journal, predict):
    places = [(f"task-{task}", f"site-{site}") for task in range(10) for site in range(100)]
    body = {**ESTIMATE, "realised": ESTIMATE["estimated"], "weeks": [{"week": "2026-W48", "labels": 9}] * 50}
    journal.append([predict()])
    for _ in range(2):
        write_state(journal, places, body, last=1, history=bytes(20_000))
    told = Serving(dict.fromkeys(places, 1), alarms={(*place, "pixels"): 1 for place in places})
    exposition(journal, told)
    spent = []
    for _ in range(3):
        begun = time.perf_counter()
        text, _ = exposition(journal, told)
        spent.append(time.perf_counter() - begun)
    assert text.count(b"formulary_accuracy_realised{") == 9_000
    assert min(spent) < 0.6, f"{min(spent):.3f} s; 0.3 s is the promise, on a machine that does nothing else"
