"""The main job end to end, as a user would do it: every step is a command of this platform, run for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from imaging.config import Params, Places, Sites
from imaging.errors import DataError, NotReady
from monitoring.journal import open_journal
from registry.ledger import open_ledger
from services.demo_report import print_table, read_alarms, write_pages
from services.stack import PORTS, Stack, free_port, is_free, stack_environment
from services.traffic import Answered, send_traffic

AUTHOR, APPROVER, MONITOR = "author@demo", "approver@demo", "monitor"
SUBJECTS, CHANGE_AT = 200, 100


class Demo:
    """One run of the demo.

    Args:
        places: the checkout.
        params: its params.yaml.
        sites: its sites.yaml.
        tasks: which tasks to run, all of them in params.yaml.
        subjects: how many new subjects each site sends.
    """

    def __init__(
        self, places: Places, params: Params, sites: Sites, tasks: tuple[str, ...], subjects: int
    ) -> None:
        from rich.console import Console

        self._places, self._params, self._sites = places, params, sites
        self._tasks, self._subjects = tasks, subjects
        # Where no terminal tells its width (a log, CI), 80 columns would fold the table.
        self._console = Console(width=None if sys.stdout.isatty() else 110)
        self._started = time.monotonic()
        self._step = 0

    def run(self) -> dict[str, Any]:
        """Do it all.

        Returns:
            What var/demo.json holds.

        Raises:
            FormularyError: a step did not do its work; the message names its log.
        """
        self._say("pipeline", "dvc repro, from cohort to calibrated alarms")
        self._repro()
        self._say("registry", f"asked for by {AUTHOR}, approved by {APPROVER}")
        gates = self._promote()
        self._say(
            "traffic", f"{self._subjects} new subjects a site; one scanner at site east changes on the way"
        )
        folders = {task: self._make_traffic(task) for task in self._follow(self._tasks)}
        ports = {name: port if is_free(port) else free_port() for name, port in PORTS.items()}
        with Stack(self._places, ports, ("mlflow", "mirror", "gateway", "monitor")) as stack:
            facts = self._serve(stack, folders)
        self._say("reports", "what each site got")
        told = self._tell(gates, facts)
        print_table(self._console, told, self._places)
        return told

    def _say(self, name: str, about: str) -> None:
        self._step += 1
        spent = time.monotonic() - self._started
        self._console.print(
            f"[bold]{self._step} {name:<10}[/] {about}  [dim]at {spent:.0f} s[/]", highlight=False
        )

    def _follow(self, tasks: tuple[str, ...]) -> Any:
        """The tasks one after the other, with a bar."""
        from rich.progress import track

        return track(tasks, description="  task by task", console=self._console)

    def _command(self, *arguments: str, fails: bool = False) -> str:
        """Run `formulary ...`, which `fails` or not; if it does otherwise, show what it said."""
        command = [sys.executable, "-m", "formulary", *arguments]
        done = subprocess.run(command, cwd=self._places.root, capture_output=True, text=True, check=False)
        if bool(done.returncode) is not fails:
            raise DataError(f"formulary {' '.join(arguments)} failed:\n{done.stderr.strip()[-2000:]}", "")
        return done.stdout

    def _repro(self) -> None:
        """Run the pipeline, a task a core at a time: every stage but the first uses `fit.threads` threads.

        What tasks share comes first; a lane then touches the stages of its task alone, since DVC locks what
        a stage writes even when it has nothing to do.
        """
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        (self._places.var / "log").mkdir(parents=True, exist_ok=True)
        shared, names = _stage_names(self._places)
        self._repro_stages("shared", shared, lambda _, stage: self._say_stage(stage))
        threads = max(self._params.task(task).fit.threads for task in self._tasks)
        lanes = max(1, min(len(self._tasks), (os.cpu_count() or 1) // threads))
        columns = (TextColumn("  {task.description:<28}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress, ThreadPoolExecutor(lanes) as pool:
            bars = {task: progress.add_task(task, total=len(names)) for task in self._tasks}

            def show(task: str, stage: str) -> None:
                progress.update(bars[task], advance=1, description=stage)
                self._say_stage(stage)

            lanes_of = {task: [f"{name}@{task}" for name in names] for task in self._tasks}
            list(pool.map(lambda task: self._repro_stages(task, lanes_of[task], show), self._tasks))

    def _repro_stages(self, task: str, stages: list[str], show: Callable[[str, str], None]) -> None:
        log = self._places.var / "log" / f"repro-{task}.log"
        command = ["dvc", "--wait-for-lock", "repro", "--single-item", *stages]
        with log.open("w", buffering=1) as kept, subprocess.Popen(
            command, cwd=self._places.root, env=stack_environment({}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as child:  # fmt: skip
            for line in child.stdout or ():
                kept.write(line)
                if line.startswith(("Running stage", "Stage '")):
                    show(task, line.split("'")[1])
        if child.returncode:
            raise DataError(f"dvc repro of {task} failed with code {child.returncode}.", f"Read {log}")

    def _say_stage(self, name: str) -> None:
        """Where no terminal shows the bar, a line says what is being done."""
        if not self._console.is_terminal:
            self._console.print(f"  {name}  at {time.monotonic() - self._started:.0f} s", highlight=False)

    def _promote(self) -> dict[str, dict[str, Any]]:
        """Register, ask and approve each task's version; a refusal by the gate is work done."""
        for identity in (AUTHOR, APPROVER, MONITOR):
            self._command("registry", "keys", "create", "--identity", identity)
        gates = {}
        for task in self._follow(self._tasks):
            self._command("registry", "register", "--task", task, "--identity", AUTHOR)
            listed = json.loads(self._command("registry", "list", "--task", task, "--json"))
            number = str(self._registered(task, listed))
            verdict = json.loads(self._command("registry", "promote", task, number, "--dry-run", "--json"))
            passed = any(found["passed"] for found in verdict["sites"].values())
            ask = ("registry", "promote", task, number, "--json", "--identity", AUTHOR)
            told = self._command(*ask, fails=not passed)  # a refusal, and its reasons, stand in the ledger
            if passed and json.loads(told)["asked"] is not None:
                because = ("--because", "The gate's reasons were read; demo.")
                self._command("registry", "approve", task, number, "--identity", APPROVER, *because)
            gates[task] = {**verdict, "version": int(number)}
        return gates

    def _registered(self, task: str, listed: list[dict[str, Any]]) -> int:
        """Number of the version whose package the pipeline holds now."""
        from registry.package import digest_package

        digest = digest_package(self._places.stage(task, "package"))
        return next(int(row["version"]) for row in listed if row["digest"] == digest)

    def _make_traffic(self, task: str) -> Path:
        section = self._params.task(task).cohort
        name = f"{Path(section.source).stem}-{section.seed}-{self._subjects}"
        folder = self._places.var / "demo" / "traffic" / name
        if not (folder / "traffic.parquet").exists():
            change = str(self._subjects * CHANGE_AT // SUBJECTS)
            how = ("--subjects", str(self._subjects), "--change-at", change, "--out", str(folder))
            self._command("training", "traffic", "--task", task, *how)
        return folder

    def _serve(self, stack: Stack, folders: dict[str, Path]) -> dict[str, Any]:
        from rich.progress import Progress

        serving = {task: set(open_ledger(self._places.var).champions(task)) for task in self._tasks}
        address = stack.wait_until_ready("gateway", "/readyz" if any(serving.values()) else "/livez")
        self._say("mlflow", stack.wait_until_ready("mlflow", "/health"))  # its start would slow the answers
        self._say("gateway", address)
        before = open_journal(self._places.var).last_seq()
        answers: dict[str, dict[str, Answered]] = {}
        with Progress(console=self._console) as progress:
            for task, folder in folders.items():
                bar = progress.add_task(f"  {task:<26}", total=self._subjects * len(self._sites.sites))
                answers[task] = send_traffic(
                    address, (task, self._params.task(task)), folder, lambda bar=bar: progress.advance(bar)
                )
        self._check_answers(answers, serving)
        self._say("monitor", "charts look for what changed; Evidently compares each site with its reference")
        verdicts = self._wait_for_verdicts(answers, before)
        self._wait_for_mirror()
        alarms = read_alarms(self._places.var, before)
        return {"answers": answers, "verdicts": verdicts, "alarms": alarms, "address": address}

    def _check_answers(self, answers: dict[str, dict[str, Answered]], serving: dict[str, set[str]]) -> None:
        """Every site with an approved version got every answer; every other one was told why not.

        Raises:
            DataError: a site got something else.
        """
        for task, sites in answers.items():
            for site, got in sites.items():
                approved = site in serving[task]
                wanted = (self._subjects, set()) if approved else (0, {"not-approved"})
                if (got.answers, got.problems) != wanted:
                    raise DataError(
                        f"{site} got {got.answers} of {self._subjects} answers from {task}; {got.refusals}.",
                        f"Read {self._places.var}/log/gateway.log",
                    )

    def _wait_for_verdicts(
        self, answers: dict[str, dict[str, Answered]], before: int
    ) -> dict[tuple[str, str], Any]:
        """Until every answer was counted, and every site that got some has a verdict over all of them."""
        wanted = {
            (task, site) for task, sites in answers.items() for site, got in sites.items() if got.answers
        }
        journal = open_journal(self._places.var)
        with self._console.status("waiting for the monitor's verdicts"):
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline:
                found = {
                    (row.task, row.site): row for row in journal.newest_verdicts() if row.last_seq > before
                }
                ends = {key: journal.last_seq(*key) for key in wanted}
                counted = journal.cursor("watching") >= journal.last_seq()
                if counted and all(key in found and found[key].last_seq >= ends[key] for key in wanted):
                    return {key: found[key] for key in wanted}
                time.sleep(1)
        raise NotReady(
            "The monitor gave no verdict within 180 s.", f"Read {self._places.var / 'log'}/monitor.log"
        )

    def _wait_for_mirror(self) -> None:
        """Until MLflow knows every move of the ledger."""
        deadline = time.monotonic() + 60
        ledger = open_ledger(self._places.var)
        while ledger.pending():
            if time.monotonic() > deadline:
                raise NotReady(
                    "MLflow's aliases lag behind the ledger.", f"Read {self._places.var}/log/mirror.log"
                )
            time.sleep(0.5)

    def _tell(self, gates: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        told = {task: self._tell_task(task, gates[task], facts) for task in self._tasks}
        pages = write_pages(self._places, told)
        result = {"seconds": round(time.monotonic() - self._started, 1), "tasks": told, "reports": pages,
                  "notice": "research use only; simulated sites, see data/README.md"}  # fmt: skip
        (self._places.var / "demo.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        return result

    def _tell_task(self, task: str, gate: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        body = json.loads((self._places.stage(task, "evaluate") / "evaluation.json").read_text())
        got: dict[str, Answered] = facts["answers"][task]
        verdicts = {site: facts["verdicts"].get((task, site)) for site in self._sites.sites}
        every = Answered([spent for site in got.values() for spent in site.latencies_ms])
        return {
            "task": task,
            "version": gate["version"],
            "verdict": {"passed": any(found["passed"] for found in gate["sites"].values()),
                        "reasons": _reasons(gate)},
            "sites": {site: {name: _ends(score) for name, score in body["sites"][site].items()}
                      for site in self._sites.sites if site in body["sites"]},
            "gate": gate["sites"],
            "served": {site: {"answers": answered.answers, "version": answered.version,
                              "p50_ms": answered.percentile(50), "p99_ms": answered.percentile(99),
                              "refusals": answered.refusals} for site, answered in got.items()},
            "latency_ms": {"p50": every.percentile(50), "p99": every.percentile(99)},
            "drift": {site: bool(row and row.verdict == "drift") for site, row in verdicts.items()},
            "drift_verdict": {site: str(row.verdict) if row else "-" for site, row in verdicts.items()},
            "drift_detail": {site: row.detail if row else "no answers, so nothing to compare"
                             for site, row in verdicts.items()},
            "alarms": {site: facts["alarms"].get((task, site), []) for site in self._sites.sites},
        }  # fmt: skip


def _ends(score: dict[str, float]) -> list[float]:
    return [score["estimate"], score["low"], score["high"]]


def _reasons(gate: dict[str, Any]) -> list[str]:
    """Why each site passed or did not, and the network."""
    found = {"network": gate["network"], **gate["sites"]}
    return [f"{where}: {reason}" for where, finding in found.items() for reason in finding["reasons"]]


def _stage_names(places: Places) -> tuple[list[str], list[str]]:
    """Stages that all tasks share, and those that each task has."""
    import yaml

    stages = yaml.safe_load((places.root / "dvc.yaml").read_text())["stages"]
    own = [name for name, stage in stages.items() if "foreach" in stage]
    return [name for name in stages if name not in own], own
