"""A scrape is readable, complete, and grows with the configuration and never with the traffic."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imaging.greedy import GreedyWorker
from monitoring import telemetry
from monitoring.journal import VerdictRow
from monitoring.telemetry import Serving, exposition

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
LABELS = {"hash", "task", "site", "outcome", "reason", "stage", "le"}
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
