"""The monitor: streams and alarms at every pass, what they do to a site, and Evidently's reports apart."""

from __future__ import annotations

import logging
import signal
import threading
from datetime import UTC, datetime
from typing import Any

from imaging.config import Params, Places
from imaging.errors import FormularyError
from imaging.recipe import TaskSection
from monitoring.containment import contain_new
from monitoring.drift import Comparison, compare
from monitoring.journal import Journal, VerdictRow, open_journal
from monitoring.records import open_records
from monitoring.reference import name_columns, read_reference
from monitoring.watching import Outcome, Watch
from registry.ledger import Ledger, open_ledger
from registry.package import read_contract, shelf
from registry.projection import AXES

LOG = logging.getLogger(__name__)
PAUSE_S = 2.0


class Monitor:
    """Looks at what is new in the journal.

    Args:
        places: where the ledger, the journal and the packages lie.
        params: the tasks and how strictly each is watched.
    """

    def __init__(self, places: Places, params: Params) -> None:
        self._places, self._params = places, params
        self.journal: Journal = open_journal(places.var)
        self._records = open_records(places.var)
        self._ledger: Ledger = open_ledger(places.var)
        self._watch = Watch(places, self._records.engine)

    def pass_once(self) -> Outcome:
        """One pass over the streams, and what its alarms do: by the policies, each at its own site."""
        try:
            done = self._watch.look()
            for alarm in done.alarms:
                LOG.warning("alarm: %s v%d at %s: %s", alarm.task, alarm.version, alarm.site, alarm.detail)
            return done
        finally:  # an alarm that is written waits for nothing
            contain_new(self._places, self._records, self._ledger)

    def report(self, tasks: tuple[str, ...] = (), sites: tuple[str, ...] = ()) -> list[VerdictRow]:
        """Evidently's comparison of every site that has new rows, once.

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
                told = self.journal.newest(task, site, 1, champions[site].version)
                told, last = told or self.journal.newest(task, site, 1), newest.get((task, site))
                if told and (last is None or last.last_seq < told[0]["seq"]):
                    written += self._try((task, section), site, told[0])
        return written

    def _try(self, task: tuple[str, TaskSection], site: str, told: dict[str, Any]) -> list[VerdictRow]:
        """One site's comparison; what fails there is logged, and tried again later."""
        try:
            return [self._judge(task, site, told)]
        except FormularyError as error:
            LOG.error("%s at %s was not compared: %s", task[0], site, error)
            return []

    def _judge(self, task: tuple[str, TaskSection], site: str, told: dict[str, Any]) -> VerdictRow:
        """Judge the champion, or where it never answered what did."""
        import pandas as pd

        name, section = task
        package = shelf(self._places.var, told["package"])
        contract = read_contract(package)
        columns, axes = name_columns(contract), tuple(axis for axis in AXES if axis in told["columns"])
        reference = read_reference(package, site, columns, axes)
        how = Comparison(
            task=name, site=site, version=told["version"], columns=columns, alpha=section.reference.alpha,
            window=section.reference.window, simulated=contract.simulated,
            axes=axes if set(axes) <= set(reference) else (),
        )  # fmt: skip
        rows = self.journal.read_window(name, site, how.version, how.window)
        current = pd.DataFrame(rows, columns=["seq", *columns, *how.axes]).dropna()
        verdict = compare(reference, current, how, self._places.var)
        kept = VerdictRow(
            at=datetime.now(UTC).isoformat(timespec="milliseconds"), task=name, site=site,
            version=how.version, last_seq=told["seq"], subjects=len(current), verdict=verdict.verdict,
            detail=verdict.detail, level=how.level, columns=verdict.columns, report=verdict.report,
        )  # fmt: skip
        self.journal.write_verdict(kept)
        LOG.info("%s at %s: %s (%s)", name, site, kept.verdict, kept.detail)
        return kept

    def watch(self) -> None:
        """Look until SIGTERM or SIGINT; what goes wrong is logged and tried again.

        Reports are slow, and an alarm must not wait for them: passes have a thread of their own.
        """
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        passes = threading.Thread(target=_repeat, args=(stopped, self.pass_once), name="passes")
        passes.start()
        _import_early()
        LOG.info("watching %d tasks", len(self._params.tasks))
        _repeat(stopped, self.report)
        passes.join()


def _repeat(stopped: threading.Event, work: Any) -> None:
    while not stopped.wait(PAUSE_S):
        try:
            work()
        except FormularyError as error:
            LOG.warning("%s", error)
        except Exception:  # a locked database or a fault of a library must not end the watching
            LOG.exception("the journal could not be looked at")


def _import_early() -> Any:
    """Evidently takes seconds to import: do it before the first rows come."""
    import evidently

    return evidently
