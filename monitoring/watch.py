"""The monitor: for each task and site with a champion, a verdict whenever the journal has new rows."""

from __future__ import annotations

import logging
import signal
import threading
from datetime import UTC, datetime
from typing import Any

from imaging.config import Params, Places, TaskSection
from imaging.errors import FormularyError
from monitoring.drift import Comparison, compare
from monitoring.journal import Journal, VerdictRow, open_journal
from monitoring.reference import name_columns, read_reference
from registry.contract import read_contract
from registry.ledger import Ledger, open_ledger
from registry.package import shelf

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
        columns = name_columns(section.kind, section.classes)
        package = shelf(self._places.var, told["package"])
        how = Comparison(
            task=name, site=site, version=told["version"], columns=columns, alpha=section.reference.alpha,
            window=section.reference.window, simulated=read_contract(package).simulated,
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
