"""docs/metrics.md and the code name the same metrics, types and labels."""

import re
from pathlib import Path

from monitoring.journal import VerdictRow, open_journal
from monitoring.telemetry import METRICS, Serving, StateCollector

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented():
    rows = re.findall(r"^\| `(formulary_\w+)` \| (\w+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels in rows}


def in_code(tmp_path):
    found = {}
    for collector in METRICS._collector_to_names:
        (family,) = collector.describe() or list(collector.collect())
        found[family.name] = (family.type, tuple(collector._labelnames))
    journal = open_journal(tmp_path)
    journal.write_verdict(
        VerdictRow("2024-01-01T00:00:00+00:00", "t", "s", 1, 1, 1, "drift", "", 0.1, {}, "")
    )
    for family in StateCollector(journal, Serving({("t", "s"): 1})).collect():
        found[family.name] = (family.type, tuple(family.samples[0].labels))
    return found


def test_the_page_and_the_code_name_the_same_metrics(tmp_path):
    assert documented() == in_code(tmp_path)
