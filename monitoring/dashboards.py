"""Grafana dashboards as code: one for whoever runs the platform, one for whoever answers for its use.

`formulary monitoring dashboards deploy/grafana` writes them; they are committed, and need nothing to be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from imaging.errors import NotReady

NOTICE = "Research use only. What is simulated is said on each model's card."
PLACE = 'task=~"$task", site=~"$site"'
WIDTH = 24  # of Grafana's grid


@dataclass(frozen=True)
class Panel:
    """A picture of one query.

    Attributes:
        title: its heading.
        told: what it shows, and how to read it.
        query: PromQL; `$task` and `$site` are what the reader chose.
        legend: of each line, in Grafana's words: `{{task}}`.
        unit: Grafana's name of it.
        kind: series, number or table.
        words: what a value means, where values stand for words.
    """

    title: str
    told: str
    query: str
    legend: str = "{{task}} {{site}}"
    unit: str = "short"
    kind: str = "series"
    words: tuple[tuple[int, str], ...] = ()


Rows = dict[str, tuple[Panel, ...]]
BOUNDS = "{{task}} {{site}} {{measure}} {{bound}}"
VERDICTS = ((1, "verified"), (0, "not verified"), (-1, "NOT VALID"), (-2, "not enough cases"))
DRIFTS = ((1, "DRIFT"), (0, "in bounds"), (-1, "not enough cases"))
NO_YES = ((0, "no"), (1, "yes"))
OPERATIONS: Rows = {
    "Now": (
        Panel("Gateway answers", "Whether Prometheus reads its metrics.", 'up{job="formulary"}',
              "{{instance}}", kind="number", words=NO_YES),
        Panel("Journal can be read", "No answer leaves without a row.", "formulary_journal_up",
              "{{instance}}", kind="number", words=NO_YES),
        Panel("Alerts", "That fire now.", 'count(ALERTS{alertstate="firing"}) or vector(0)', "alerts",
              kind="number"),
        Panel("Rows to catch up", "That the monitor has not counted yet.", "formulary_monitor_lag_rows",
              "{{instance}}", kind="number"),
        Panel("Last pass", "Time since the monitor last looked.", "formulary_monitor_pass_age_seconds",
              "{{instance}}", "s", "number"),
        Panel("Journal", "Size of its file and log.", "formulary_journal_bytes", "{{instance}}", "bytes",
              "number"),
    ),
    "Requests": (
        Panel("Requests", "For a prediction, each second.", 'task:formulary_requests:rate5m{task=~"$task"}',
              "{{task}}", "reqps"),
        Panel("Answers", "What of them was answered, by site.",
              f"task_site:formulary_goodput:rate5m{{{PLACE}}}", unit="reqps"),
        Panel("Faults", "Share that failed through no fault of the caller.",
              'task:formulary_faults:share5m{task=~"$task"}', "{{task}}", "percentunit"),
        Panel("Refusals", "Requests without an answer, by reason, each second.",
              "sum by (reason) (rate(formulary_refusals_total[5m]))", "{{reason}}", "reqps"),
    ),
    "Time": (
        Panel("Slowest in a hundred", "99th percentile of the time of an answer, over five minutes.",
              'task:formulary_answer_seconds:p99_5m{task=~"$task"}', "{{task}}", "s"),
        Panel("Where it goes", "Mean time of each stage.",
              'sum by (stage) (rate(formulary_stage_seconds_sum{task=~"$task"}[5m])) / '
              'sum by (stage) (rate(formulary_stage_seconds_count{task=~"$task"}[5m]))', "{{stage}}", "s"),
        Panel("Images in a batch", "Mean of the engine's calls.",
              'sum by (task) (rate(formulary_batch_images_sum{task=~"$task"}[5m])) / '
              'sum by (task) (rate(formulary_batch_images_count{task=~"$task"}[5m]))', "{{task}}"),
        Panel("Commit of the journal", "99th percentile over five minutes.",
              "formulary_journal_commit_seconds:p99_5m", "p99", "s"),
    ),
    "Models": (
        Panel("What serves where", "Versions, by the ledger.", f"formulary_serving_version{{{PLACE}}}",
              kind="table"),
        Panel("Packages refused at load", "Since the gateway started.",
              'formulary_load_failures_total{task=~"$task"} or 0 * sum by (task) (formulary_serving_version)',
              "{{task}}"),
        Panel("Silent trials", "Cases an hour, by what became of them.",
              'sum by (task, outcome) (rate(formulary_trial_cases_total{task=~"$task"}[5m])) * 3600',
              "{{task}} {{outcome}}"),
        Panel("Jobs", "Volumes and explanations taken, an hour.",
              'sum by (task, kind) (rate(formulary_jobs_total{task=~"$task"}[5m])) * 3600',
              "{{task}} {{kind}}"),
    ),
}  # fmt: skip
CLINICAL: Rows = {
    "Alarms and what they did": (
        Panel("Open alarms", "That nobody has acknowledged, by what is watched.",
              f"sum by (task, site, part) (formulary_open_alarms{{{PLACE}}})", kind="table"),
        Panel("Suspended", "Where every request is answered with 503 and the reason.",
              f"formulary_suspended{{{PLACE}}}", kind="table", words=((1, "suspended"),)),
        Panel("Silent for", "Age of the newest answer that the monitor counted.",
              f"formulary_site_idle_seconds{{{PLACE}}}", unit="s"),
        Panel("Answers that leave the decision open", "Share of all answers, over an hour.",
              f"sum by (task, site) (rate(formulary_abstentions_total{{{PLACE}}}[1h])) / "
              f'sum by (task, site) (rate(formulary_requests_total{{{PLACE}, outcome="answered"}}[1h]))',
              unit="percentunit"),
    ),
    "How right it is": (
        Panel("Whether the estimate may be believed", "By late labels; without them it is not verified.",
              f"formulary_accuracy_verdict{{{PLACE}}}", kind="table", words=VERDICTS),
        Panel("Accuracy without labels", "Estimate and its interval.",
              f'formulary_accuracy_estimated{{{PLACE}, measure="accuracy"}}', BOUNDS, "percentunit"),
        Panel("Sensitivity and specificity without labels", "Estimates and their intervals.",
              f'formulary_accuracy_estimated{{{PLACE}, measure!="accuracy"}}', BOUNDS, "percentunit"),
        Panel("Sensitivity and specificity by late labels", "What happened, and its intervals.",
              f'formulary_accuracy_realised{{{PLACE}, measure!="accuracy"}}', BOUNDS, "percentunit"),
    ),
    "What moved": (
        Panel("Combined score", "1 is at the limit of the charts. For the eye: it alarms nobody.",
              f"formulary_combined_score{{{PLACE}}}"),
        Panel("Window tests", "Evidently's tests of the newest window.", f"formulary_drift{{{PLACE}}}",
              kind="table", words=DRIFTS),
        Panel("Age of the verdict", "Since the newest window was tested.",
              f"formulary_drift_age_seconds{{{PLACE}}}", unit="s"),
    ),
}  # fmt: skip
BOARDS = {
    "operations": ("Formulary: operations", OPERATIONS),
    "clinical": ("Formulary: clinical state", CLINICAL),
}


def write_dashboards(folder: Path) -> list[Path]:
    """Write a JSON file a dashboard, the same bytes each time.

    Returns:
        The files.

    Raises:
        NotReady: the builder is not installed.
    """
    if not find_spec("grafana_foundation_sdk"):
        fact = "grafana-foundation-sdk, a tool of development, is not installed."
        raise NotReady(fact, "Run `make .venv/dev`; or take the files of deploy/grafana as they are.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in BOARDS:
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(build_dashboard(name))
    return paths


def list_queries() -> list[str]:
    """Every query of every dashboard."""
    return [panel.query for _, rows in BOARDS.values() for panels in rows.values() for panel in panels]


def build_dashboard(name: str) -> str:
    """A dashboard as Grafana imports it.

    Args:
        name: operations or clinical.

    Returns:
        JSON.
    """
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    title, rows = BOARDS[name]
    built = dashboard.Dashboard(title).uid(f"formulary-{name}").description(NOTICE).tags(["formulary"])
    built.readonly().refresh("30s").time("now-6h", "now").timezone("utc")
    built.with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    for label in ("task", "site"):
        built.with_variable(_vary(label))
    for heading, panels in rows.items():
        built.with_row(dashboard.Row(heading))
        for panel in panels:
            built.with_panel(_draw(panel, WIDTH // len(panels)))
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build()) + "\n"


def _source() -> Any:
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    return DataSourceRef(type_val="prometheus", uid="${source}")


def _vary(label: str) -> Any:
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.models.dashboard import VariableOption, VariableRefresh

    query = f"label_values(formulary_serving_version, {label})"
    chosen = dashboard.QueryVariable(label).label(label.capitalize()).query(query).datasource(_source())
    chosen.current(VariableOption(selected=True, text="All", value="$__all"))
    return chosen.multi(True).include_all(True).all_value(".*").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def _draw(panel: Panel, span: int) -> Any:
    from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
    from grafana_foundation_sdk.models.common import BigValueGraphMode, LegendPlacement
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    asked = (
        prometheus.Dataquery().expr(panel.query).legend_format(panel.legend).datasource(_source()).ref_id("A")
    )
    kinds: dict[str, Any] = {"series": timeseries.Panel, "number": stat.Panel, "table": table.Panel}
    drawn = kinds[panel.kind]().title(panel.title).description(panel.told).unit(panel.unit)
    if panel.kind == "table":
        drawn.show_header(True)
        asked.instant().format(PromQueryFormat.TABLE)
    elif panel.kind == "number":
        drawn.graph_mode(BigValueGraphMode.NONE)
    else:
        drawn.legend(common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM))
    if panel.words:
        drawn.mappings([_map(panel.words)])
    height = 4 if panel.kind == "number" else 8
    return drawn.datasource(_source()).with_target(asked).span(span).height(height)


def _map(words: tuple[tuple[int, str], ...]) -> Any:
    from grafana_foundation_sdk.models.dashboard import ValueMap, ValueMappingResult

    return ValueMap({str(value): ValueMappingResult(text=word) for value, word in words})
