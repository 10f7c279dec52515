"""Prometheus metrics. docs/metrics.md lists them; a test holds the two equal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

from imaging.vocabulary import Drift

if TYPE_CHECKING:
    from monitoring.journal import Journal

METRICS = CollectorRegistry()
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
REQUESTS = Counter(
    "formulary_requests", "Requests for a prediction", ["task", "site", "outcome"], registry=METRICS
)
REFUSALS = Counter(
    "formulary_refusals", "Requests without an answer, by reason", ["reason"], registry=METRICS
)
STAGE = Histogram(
    "formulary_stage_seconds",
    "Time in each stage of a request",
    ["task", "stage"],
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
HEAD = Gauge("formulary_ledger_head", "Number of the last event in the ledger", ["hash"], registry=METRICS)
GENERATION = Gauge("formulary_ledger_generation", "Events in the ledger as last read", registry=METRICS)
VALUES = {Drift.DRIFT: 1, Drift.IN_BOUNDS: 0, Drift.TOO_FEW: -1}


class StateCollector:
    """What is true now, read at each scrape: the newest verdicts, and what serves where.

    Args:
        journal: the monitor writes verdict rows into it, Prometheus reads them here.
        serving: (task, site) -> version.
    """

    def __init__(self, journal: Journal, serving: dict[tuple[str, str], int]) -> None:
        self._journal, self._serving = journal, serving

    def collect(self) -> Iterator[Any]:
        """One gauge for the version, one for the verdict, one for its age."""
        place = ["task", "site"]
        serving = GaugeMetricFamily("formulary_serving_version", "Version that answers", labels=place)
        for (task, site), version in self._serving.items():
            serving.add_metric([task, site], version)
        yield serving
        drift = GaugeMetricFamily(
            "formulary_drift", "1 drift, 0 in bounds, -1 not enough cases", labels=["task", "site"]
        )
        age = GaugeMetricFamily(
            "formulary_drift_age_seconds", "Age of the newest verdict", labels=["task", "site"]
        )
        for row in self._journal.newest_verdicts():
            drift.add_metric([row.task, row.site], VALUES[Drift(row.verdict)])
            age.add_metric([row.task, row.site], time.time() - datetime.fromisoformat(row.at).timestamp())
        yield drift
        yield age


def exposition(journal: Journal, serving: dict[tuple[str, str], int]) -> tuple[bytes, str]:
    """Everything for a scrape.

    Args:
        journal: for the newest verdicts.
        serving: (task, site) -> version.

    Returns:
        The text, and its content type.
    """
    state = CollectorRegistry()
    state.register(StateCollector(journal, serving))
    return generate_latest(METRICS) + generate_latest(state), CONTENT_TYPE_LATEST
