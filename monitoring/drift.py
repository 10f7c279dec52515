"""Whether a site's window differs from its reference, by Evidently's reports at levels that were measured."""

from __future__ import annotations

import html
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaging.vocabulary import Drift
from monitoring.charts import find_change
from monitoring.reference import SMALLEST_REFERENCE

SILENT = {"DO_NOT_TRACK": "1"}
HEAD = """<div style="font:16px/1.5 system-ui,sans-serif;padding:1rem 2rem;background:#fff6dd;color:#222">
<h1 style="font-size:22px;margin:0">{}</h1>{} {}</div>"""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how strictly.

    Attributes:
        task: the task.
        site: the site.
        version: whose answers are in the window.
        columns: what is tested, each at `level`.
        alpha: false alarms a window, over all columns.
        window: subjects; a shorter window is "not enough cases".
        simulated: what of the reference is not real, in plain words; stands on top of the report.
        axes: of the embedding, which are tested together as one more column; empty where there are none.
    """

    task: str
    site: str
    version: int
    columns: tuple[str, ...]
    alpha: float
    window: int
    simulated: str
    axes: tuple[str, ...] = ()

    @property
    def level(self) -> float:
        """Level of one column's test (Bonferroni)."""
        return self.alpha / (len(self.columns) + bool(self.axes))

    @property
    def tested(self) -> tuple[str, ...]:
        """What has a p-value each."""
        return (*self.columns, "embedding") if self.axes else self.columns


@dataclass(frozen=True)
class Verdict:
    """What the monitor says of a window; `columns` are p-values, `detail` is a sentence."""

    verdict: Drift
    detail: str
    columns: dict[str, float]
    report: str


def compare(reference: Any, current: Any, how: Comparison, var: Path) -> Verdict:
    """Compare a window with the reference and keep Evidently's report and snapshot.

    Args:
        reference: DataFrame, one row a subject.
        current: DataFrame, one row a subject, oldest first.
        how: what to compare.
        var: the report goes to report/<task>/drift-<site>.html, the snapshot to the workspace evidently/.

    Returns:
        The verdict; without a report when there are not enough cases.
    """
    if len(current) < how.window or len(reference) < SMALLEST_REFERENCE:
        detail = f"{len(current)} of {how.window} subjects, {len(reference)} in the reference"
        return Verdict(Drift.TOO_FEW, detail, {}, "")
    snapshot = _run(reference, current, how)
    values = _p_values(snapshot, how)
    path = var / "report" / how.task / f"drift-{how.site}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    snapshot.save_html(str(path))
    _keep(snapshot, how, var)
    moved = sorted((name for name in values if values[name] < how.level), key=lambda name: values[name])
    detail = _explain(reference, current, moved) if moved else "in bounds"
    _head(path, how, detail)
    return Verdict(Drift.DRIFT if moved else Drift.IN_BOUNDS, detail, values, str(path))


def _head(path: Path, how: Comparison, detail: str) -> None:
    """Say on top of Evidently's page what it is about: its own page names no site."""
    words = [html.escape(f"{how.task} v{how.version} at {how.site}: {detail}"),
             f"The newest {how.window} subjects against this site's reference, one row a subject; each of "
             f"{len(how.tested)} columns is tested at p &lt; {how.level:.2g}.",
             f"Research use only. {html.escape(how.simulated)}"]  # fmt: skip
    head = HEAD.format(*words)
    path.write_text(re.sub(r"(<body[^>]*>)", lambda found: found[1] + head, path.read_text(), count=1))


def _explain(reference: Any, current: Any, moved: list[str]) -> str:
    """`noise +41 %, since case 112`, and which other columns moved."""
    first = next((name for name in moved if name != "embedding"), "")
    if not first:
        return "embeddings differ, no column does"
    moved = [first, *(name for name in moved if name != first)]
    case = find_change(current[first].to_numpy())
    before, after = reference[first].median(), current[first].iloc[case - 1 :].median()
    spread = float(reference[first].std()) or 1.0
    positive = float(reference[first].min()) > 0
    change = f"{100 * (after / before - 1):+.0f} %" if positive else f"{(after - before) / spread:+.1f} sd"
    others = f"; also {', '.join(moved[1:])}" if moved[1:] else ""
    return f"{first} {change}, since case {case}{others}"


def _run(reference: Any, current: Any, how: Comparison) -> Any:
    os.environ.update(SILENT)
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    from monitoring.embeddings import name_metric

    names = [*how.columns, *how.axes]
    definition = DataDefinition(numerical_columns=names)
    old, new = (Dataset.from_pandas(table[names], definition) for table in (reference, current))
    metrics: list[Any] = [ValueDrift(column=name, method="ks", threshold=how.level) for name in how.columns]
    if how.axes:  # so many permutations that p can be well below the level
        drawn = max(999, math.ceil(5 / how.level))
        metrics.append(name_metric()(columns=list(how.axes), level=how.level, permutations=drawn))
    metadata = {"task": how.task, "site": how.site, "version": str(how.version), "simulated": how.simulated}
    return Report(metrics, metadata=metadata, tags=[how.site, f"v{how.version}"]).run(new, old)


def _p_values(snapshot: Any, how: Comparison) -> dict[str, float]:
    told = snapshot.dict()["metrics"]
    return {name: float(metric["value"]) for name, metric in zip(how.tested, told, strict=True)}


def _keep(snapshot: Any, how: Comparison, var: Path) -> None:
    """Add the snapshot, without data, to the workspace that Evidently's own pages show."""
    from evidently.ui.workspace import Workspace

    workspace = Workspace.create(str(var / "evidently"))
    name = f"{how.task} at {how.site}"
    found = workspace.search_project(name)
    project = found[0] if found else workspace.create_project(name, f"Research use only. {how.simulated}")
    workspace.add_run(project.id, snapshot, include_data=False, name=f"{how.site} v{how.version}")
