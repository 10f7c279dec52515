"""Whether a site's window differs from its reference, by Evidently's tests, and the monitor that asks."""

from __future__ import annotations

import html
import logging
import os
import re
import signal
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from imaging.config import Params, Places
from imaging.errors import FormularyError
from imaging.recipe import TaskSection
from imaging.vocabulary import Drift
from monitoring.journal import Journal, VerdictRow, open_journal
from monitoring.reference import name_columns, read_reference
from registry.ledger import Ledger, open_ledger
from registry.package import read_contract, shelf

SMALLEST_REFERENCE = 20
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
        columns: what is tested, each at alpha / number of columns.
        alpha: false alarms a window, over all columns.
        window: subjects; a shorter window is "not enough cases".
        simulated: what of the reference is not real, in plain words; stands on top of the report.
    """

    task: str
    site: str
    version: int
    columns: tuple[str, ...]
    alpha: float
    window: int
    simulated: str

    @property
    def level(self) -> float:
        """Level of one column's test (Bonferroni)."""
        return self.alpha / len(self.columns)


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


def find_change(values: np.ndarray) -> int:
    """The case (1, 2, ...) from which a stream's mean differs most from before (least squares)."""
    kept = np.clip(values, *np.quantile(values, (0.025, 0.975)))  # so that one outlier moves nothing
    centred = kept - kept.mean()
    counts = np.arange(1, len(centred))
    before = np.cumsum(centred)[:-1]
    gain = before**2 / counts + before**2 / (len(centred) - counts)
    return int(np.argmax(gain)) + 2


def _head(path: Path, how: Comparison, detail: str) -> None:
    """Say on top of Evidently's page what it is about: its own page names no site."""
    words = [html.escape(f"{how.task} v{how.version} at {how.site}: {detail}"),
             f"The newest {how.window} subjects against this site's reference, one row a subject; each of "
             f"{len(how.columns)} columns is tested at p &lt; {how.level:.2g}.",
             f"Research use only. {html.escape(how.simulated)}"]  # fmt: skip
    head = HEAD.format(*words)
    path.write_text(re.sub(r"(<body[^>]*>)", lambda found: found[1] + head, path.read_text(), count=1))


def _explain(reference: Any, current: Any, moved: list[str]) -> str:
    """`noise +41 %, since case 112`, and which other columns moved."""
    first = moved[0]
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

    definition = DataDefinition(numerical_columns=list(how.columns))
    old, new = (Dataset.from_pandas(table[list(how.columns)], definition) for table in (reference, current))
    metrics = [ValueDrift(column=name, method="ks", threshold=how.level) for name in how.columns]
    metadata = {"task": how.task, "site": how.site, "version": str(how.version), "simulated": how.simulated}
    return Report(metrics, metadata=metadata, tags=[how.site, f"v{how.version}"]).run(new, old)


def _p_values(snapshot: Any, how: Comparison) -> dict[str, float]:
    told = snapshot.dict()["metrics"]
    return {name: float(metric["value"]) for name, metric in zip(how.columns, told, strict=True)}


def _keep(snapshot: Any, how: Comparison, var: Path) -> None:
    """Add the snapshot, without data, to the workspace that Evidently's own pages show."""
    from evidently.ui.workspace import Workspace

    workspace = Workspace.create(str(var / "evidently"))
    found = workspace.search_project(how.task)
    project = found[0] if found else workspace.create_project(how.task, f"Research use only. {how.simulated}")
    workspace.add_run(project.id, snapshot, include_data=False, name=f"{how.site} v{how.version}")


LOG = logging.getLogger(__name__)
PAUSE_S = 2.0


class Monitor:
    """Compares live windows with references and writes verdicts.

    Args:
        places: where the ledger, the journal and the packages lie.
        params: the tasks and how strictly each is watched.
    """

    def __init__(self, places: Places, params: Params) -> None:
        self._places, self._params = places, params
        self.journal: Journal = open_journal(places.var)
        self._ledger: Ledger = open_ledger(places.var)

    def look(self, tasks: tuple[str, ...] = (), sites: tuple[str, ...] = ()) -> list[VerdictRow]:
        """Compare every site that has new rows, once.

        Args:
            tasks: only these; empty means all.
            sites: only these; empty means all.

        Returns:
            The verdicts that were written.
        """
        newest = {(row.task, row.site): row for row in self.journal.newest_verdicts()}
        written = []
        for task, section in self._params.tasks.items():
            champions = self._ledger.champions(task) if task in (tasks or (task,)) else {}
            for site in sorted(set(champions) & set(sites or champions)):
                told, last = self.journal.newest(task, site, 1), newest.get((task, site))
                if told and (last is None or last.last_seq < told[0]["seq"]):
                    written.append(self._judge((task, section), site, told[0]))
        return written

    def _judge(self, task: tuple[str, TaskSection], site: str, told: dict[str, Any]) -> VerdictRow:
        """Judge the version that gave the newest answer: the champion, or what stays while it is refused."""
        import pandas as pd

        name, section = task
        package = shelf(self._places.var, told["package"])
        contract = read_contract(package)
        columns = name_columns(contract)
        how = Comparison(
            task=name, site=site, version=told["version"], columns=columns, alpha=section.reference.alpha,
            window=section.reference.window, simulated=contract.simulated,
        )  # fmt: skip
        rows = self.journal.read_window(name, site, how.version, how.window)
        reference = read_reference(package, site, columns)
        verdict = compare(reference, pd.DataFrame(rows, columns=["seq", *columns]), how, self._places.var)
        kept = VerdictRow(
            at=datetime.now(UTC).isoformat(timespec="milliseconds"), task=name, site=site,
            version=how.version, last_seq=told["seq"], subjects=len(rows), verdict=verdict.verdict,
            detail=verdict.detail, level=how.level, columns=verdict.columns, report=verdict.report,
        )  # fmt: skip
        self.journal.write_verdict(kept)
        LOG.info("%s at %s: %s (%s)", name, site, kept.verdict, kept.detail)
        return kept

    def watch(self) -> None:
        """Look until SIGTERM or SIGINT; what goes wrong is logged and tried again."""
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        _import_early()
        LOG.info("watching %d tasks", len(self._params.tasks))
        while not stopped.wait(PAUSE_S):
            try:
                self.look()
            except FormularyError as error:
                LOG.warning("%s", error)
            except Exception:  # a locked database or a fault of a library must not end the watching
                LOG.exception("the journal could not be compared")


def _import_early() -> Any:
    """Evidently takes seconds to import: do it before the first rows come."""
    import evidently

    return evidently
