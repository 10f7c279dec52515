"""The committed dashboards are what the code makes, and they ask for metrics that there are."""

import json
import re
from pathlib import Path

import pytest
import yaml

from imaging.errors import NotReady
from monitoring import dashboards
from monitoring.dashboards import BOARDS, list_queries, write_dashboards

ROOT = Path(__file__).parents[3]
RULES = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))


def read_board(name):
    return json.loads((ROOT / "deploy" / "grafana" / f"{name}.json").read_text())


def test_what_is_committed_is_what_the_code_makes(tmp_path):
    assert {path.stem for path in write_dashboards(tmp_path)} == set(BOARDS)
    for name in BOARDS:
        told = (ROOT / "deploy" / "grafana" / f"{name}.json").read_text()
        assert (tmp_path / f"{name}.json").read_text() == told


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_fills_its_rows_and_every_panel_is_explained(name):
    board = read_board(name)
    assert board["uid"] == f"formulary-{name}"
    assert "Research use only" in board["description"]
    assert [one["name"] for one in board["templating"]["list"]] == ["source", "task", "site"]
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert [target["expr"] for target in panel["targets"]]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
    lines = {}
    for panel in panels:
        lines.setdefault(panel["gridPos"]["y"], []).append(panel["gridPos"]["w"])
    assert all(sum(widths) == 24 for widths in lines.values())


def test_every_query_of_the_code_is_on_a_dashboard():
    shown = [target["expr"] for name in BOARDS for panel in read_board(name)["panels"]
             for target in panel.get("targets", [])]  # fmt: skip
    assert sorted(shown) == sorted(list_queries())
    assert len(shown) > 20


def test_rules_and_dashboards_name_only_metrics_that_there_are():
    page = (ROOT / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"^\| `(formulary_\w+)`", page, re.MULTILINE))
    text = "\n".join([*(path.read_text() for path in RULES), *list_queries()])
    recorded = {rule["record"] for path in RULES for group in yaml.safe_load(path.read_text())["groups"]
                for rule in group["rules"] if "record" in rule}  # fmt: skip
    named = set(re.findall(r"\b[\w:]*formulary_[\w:]*", text)) - recorded
    assert len(named) > 15
    assert {re.sub("_(total|bucket|sum|count)$", "", name) for name in named} <= known


def test_without_its_builder_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboards, "find_spec", lambda _: None)
    with pytest.raises(NotReady, match="grafana-foundation-sdk"):
        write_dashboards(tmp_path)
