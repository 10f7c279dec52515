"""Prometheus metrics. docs/metrics.md lists them; a test holds the two equal."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    values,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from imaging.vocabulary import Drift

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
JOBS = Counter("formulary_jobs", "Jobs that were taken", ["task", "kind"], registry=METRICS)
TRIAL = Counter(
    "formulary_trial_cases",
    "Cases of silent trials: answered, failed, or dropped for want of time",
    ["task", "outcome"],
    registry=METRICS,
)
TRIAL_STARTS = Counter(
    "formulary_trial_starts", "Starts of a challenger's process", ["task"], registry=METRICS
)
VALUES = {Drift.DRIFT: 1, Drift.IN_BOUNDS: 0, Drift.TOO_FEW: -1}


@dataclass(frozen=True)
class Serving:
    """What a gateway serves now.

    Attributes:
        versions: (task, site) -> version that answers.
        generation: events in the ledger as last read.
        head: hash of the last of them.
    """

    versions: dict[tuple[str, str], int]
    generation: int = 0
    head: str = ""


class StateCollector:
    """What is true now, read at each scrape: the newest verdicts, and what serves where.

    Args:
        journal: the monitor writes verdict rows into it, Prometheus reads them here.
        serving: what the gateway serves.
    """

    def __init__(self, journal: Journal, serving: Serving) -> None:
        self._journal, self._serving = journal, serving

    def collect(self) -> Iterator[Any]:
        """One gauge for the version, one for the verdict, one for its age; two for the ledger."""
        place = ["task", "site"]
        told = self._serving
        yield GaugeMetricFamily(
            "formulary_ledger_generation", "Events in the ledger as last read", value=told.generation
        )
        head = GaugeMetricFamily(
            "formulary_ledger_head", "Number of the last event in the ledger", labels=["hash"]
        )
        head.add_metric([told.head], told.generation)
        yield head
        serving = GaugeMetricFamily("formulary_serving_version", "Version that answers", labels=place)
        for (task, site), version in told.versions.items():
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


def exposition(journal: Journal, serving: Serving) -> tuple[bytes, str]:
    """Everything for a scrape; of several workers the sum.

    Args:
        journal: for the newest verdicts.
        serving: what the gateway serves.

    Returns:
        The text, and its content type.
    """
    state = CollectorRegistry()
    state.register(StateCollector(journal, serving))
    counted = METRICS
    if WORKERS > 1:
        counted = CollectorRegistry()
        MultiProcessCollector(counted)  # type: ignore[no-untyped-call]
    return generate_latest(counted) + generate_latest(state), CONTENT_TYPE_LATEST
