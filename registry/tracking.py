"""A training run, followed in MLflow while it goes: parameters, metrics, the machine's load, curves.

A thread does the writing, so that a slow or vanished store costs the training nothing. Where MLflow cannot be
reached, stderr says so and `tracked` is false: a run that is not in MLflow never looks as if it were.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

from registry.store import open_store, tracking_uri

CURVES_S = 30.0  # between two pictures of the curves
GOODBYE_S = 60.0  # that the end of training waits for the store
LOSSES = ("loss", "validation_loss")


class Run:
    """A run in MLflow, or in nothing; `tracked` tells, after its end, whether MLflow has the whole of it."""

    def __init__(self) -> None:
        self.tracked = False
        self._epochs: dict[int, dict[str, Any]] = {}
        self._drawn = time.monotonic()
        self._writer = ThreadPoolExecutor(1)

    def log(self, told: Mapping[str, Any]) -> None:
        """Tell an epoch's numbers, "epoch" among them; returns at once."""
        if self.tracked:
            self._writer.submit(self._attempt, self._log, dict(told))

    def _attempt(self, job: Callable[..., None], *arguments: Any) -> None:
        try:
            if self.tracked or job == self._begin:
                job(*arguments)
        except Exception as error:  # whatever the store raises: training goes on, and the loss is told
            self._lose(f"{type(error).__name__}: {str(error)[:200]}")

    def _lose(self, fact: str) -> None:
        self.tracked = False
        print(f"MLflow does not have the whole of this training. {fact}", file=sys.stderr)

    def _begin(self, var: Path, task: str, recipe: str, params: Mapping[str, Any]) -> None:
        (var / "mlflow").mkdir(parents=True, exist_ok=True)
        remote = tracking_uri(var).startswith("http")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        with open(var / "mlflow" / "lock", "w") as lock:  # two trainings may not both make a new database
            flock(lock, LOCK_EX)
            self._client = open_store(var)
            experiment = self._client.get_experiment_by_name(task)
            folder = None if remote else (var.resolve() / "mlflow" / "artifacts" / task).as_uri()
            number = experiment.experiment_id if experiment else self._client.create_experiment(task, folder)
        import pandas as pd
        from mlflow.entities import Param
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        begun = f"tags.recipe = '{recipe}' and attributes.status != 'FINISHED'"
        run = [*self._client.search_runs([number], begun), None][0]
        run = run or self._client.create_run(number, tags={"recipe": recipe}, run_name=f"fit {task}")
        self._run = run.info.run_id
        self._client.update_run(self._run, "RUNNING")
        for name in LOSSES:
            for metric in self._client.get_metric_history(self._run, name):
                self._epochs.setdefault(metric.step, {"epoch": metric.step})[name] = metric.value
        flat = pd.json_normalize(dict(params)).iloc[0].to_dict()
        told = [Param(name, str(value)[:500]) for name, value in flat.items()]
        self._client.log_batch(self._run, params=told)
        self._monitor = SystemMetricsMonitor(self._run, resume_logging=True)
        self._monitor.start()
        self.tracked = True

    def _log(self, told: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), int(told["epoch"])
        if step not in self._epochs:
            metrics = [Metric(name, float(told[name]), now, step) for name in told if name != "epoch"]
            self._client.log_batch(self._run, metrics)
        self._epochs[step] = self._epochs.get(step, {}) | told
        if time.monotonic() - self._drawn > CURVES_S:
            self._draw()

    def _draw(self) -> None:
        """History and curves as artefacts, replaced as the run goes on."""
        from matplotlib.figure import Figure

        told = [self._epochs[step] for step in sorted(self._epochs)]
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
        for name in LOSSES:
            axes.plot([epoch["epoch"] for epoch in told], [epoch[name] for epoch in told], label=name)
        axes.legend()
        self._client.log_dict(self._run, {"epochs": told}, "history.json")
        self._client.log_figure(self._run, figure, "curves.png")
        self._drawn = time.monotonic()

    def _end(self, status: str) -> None:
        self._draw()
        self._monitor.finish()
        self._client.set_terminated(self._run, status)


@contextmanager
def track(var: Path, task: str, recipe: str, params: Mapping[str, Any]) -> Iterator[Run]:
    """Follow a training run; one of the same recipe that did not finish is continued.

    Args:
        var: holds the store, unless MLFLOW_TRACKING_URI names one. FORMULARY_TRACKING=off follows nothing.
        task: name of MLflow's experiment.
        recipe: digest of what the weights depend on.
        params: of the recipe, nested.
    """
    run, status = Run(), "FAILED"
    if os.environ.get("FORMULARY_TRACKING") != "off":
        run._attempt(run._begin, var, task, recipe, params)
    try:
        yield run
        status = "FINISHED"
    finally:
        if run.tracked:
            last = run._writer.submit(run._attempt, run._end, status)
            if wait([last], GOODBYE_S).not_done:
                run._lose(f"It did not answer for {GOODBYE_S:.0f} s.")
        run._writer.shutdown(wait=False, cancel_futures=True)
