"""Prometheus metrics. docs/metrics.md lists them; a test holds the two equal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector

from monitoring.gauges import Now, Serving

if TYPE_CHECKING:
    from monitoring.journal import Journal

WORKERS = int(os.environ.get("FORMULARY_WORKERS", "1"))
if WORKERS == 1:  # one process counts in memory; several share the files that BentoML points at
    values.ValueClass = values.MutexValue
METRICS = CollectorRegistry()
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
REQUESTS = Counter(
    "formulary_requests", "Requests for a prediction", ["task", "site", "outcome"], registry=METRICS
)
REFUSALS = Counter(
    "formulary_refusals", "Requests without an answer, by reason", ["reason"], registry=METRICS
)
ABSTENTIONS = Counter(
    "formulary_abstentions", "Answers that leave the decision open", ["task", "site"], registry=METRICS
)
STAGE = Histogram(
    "formulary_stage_seconds",
    "Time in each stage of a request",
    ["task", "stage"],
    buckets=SECONDS,
    registry=METRICS,
)
ANSWER = Histogram(
    "formulary_answer_seconds",
    "Time from a request's head to its durable row",
    ["task"],
    buckets=SECONDS,
    registry=METRICS,
)
BATCH = Histogram(
    "formulary_batch_images",
    "Images in one engine call",
    ["task"],
    buckets=(1, 2, 4, 8, 16, 32, 64),
    registry=METRICS,
)
JOURNAL_ROWS = Counter("formulary_journal_rows", "Rows that the journal holds durably", registry=METRICS)
JOURNAL_COMMIT = Histogram(
    "formulary_journal_commit_seconds", "Time of one journal commit", buckets=SECONDS, registry=METRICS
)
LOAD_FAILURES = Counter("formulary_load_failures", "Packages refused at load", ["task"], registry=METRICS)
JOBS = Counter("formulary_jobs", "Jobs that were taken", ["task", "kind"], registry=METRICS)
PIXELS_DROPPED = Counter(
    "formulary_pixels_dropped", "Images that a site wants kept, and that were not", ["site"], registry=METRICS
)
TRIAL = Counter(
    "formulary_trial_cases",
    "Cases of silent trials: answered, failed, or dropped for want of time",
    ["task", "outcome"],
    registry=METRICS,
)
TRIAL_STARTS = Counter(
    "formulary_trial_starts", "Starts of a challenger's process", ["task"], registry=METRICS
)


def exposition(journal: Journal, serving: Serving) -> tuple[bytes, str]:
    """Everything for a scrape; of several workers the sum.

    Args:
        journal: for the newest verdicts.
        serving: what the gateway serves.

    Returns:
        The text, and its content type.
    """
    counted = METRICS
    if WORKERS > 1:
        counted = CollectorRegistry()
        MultiProcessCollector(counted)  # type: ignore[no-untyped-call]
    now = "".join(line for gauge in Now(journal, serving).collect() for line in gauge.write())
    return generate_latest(counted) + now.encode(), CONTENT_TYPE_LATEST
