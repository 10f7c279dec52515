"""docs/metrics.md and the code name the same metrics, types and labels."""

import re
from pathlib import Path

from monitoring.gauges import Now, Serving
from monitoring.journal import Prediction, open_journal
from monitoring.telemetry import METRICS
from tests.tiny_state import write_state

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented():
    rows = re.findall(r"^\| `(formulary_\w+)` \| (\w+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels in rows}


def in_code(tmp_path):
    found = {}
    for collector in METRICS._collector_to_names:
        (family,) = collector.describe() or list(collector.collect())
        found[family.name] = (family.type, tuple(collector._labelnames))
    journal, place = open_journal(tmp_path), ("t", "s")
    journal.append([Prediction("i", "r", "t", "s", 1, "p", "e", None, "0" * 64, {}, {})])
    write_state(journal, [place], last=1)
    serving = Serving({place: 1}, suspended=frozenset([place]), alarms={(*place, "pixels"): 1})
    for gauge in Now(journal, serving).collect():
        assert gauge.rows, f"{gauge.name} tells nothing"
        found[gauge.name] = ("gauge", gauge.labels)
    return found


def test_the_page_and_the_code_name_the_same_metrics(tmp_path):
    assert documented() == in_code(tmp_path)
