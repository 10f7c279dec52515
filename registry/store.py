"""MLflow: a client of it, its server, and what it is told of a version: run, metrics, data sets, model, tags.

Nothing is decided here. Everything is written from the signed statements, so a lost MLflow database is filled
again by `formulary registry mirror`.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

from imaging.errors import RegistryError
from imaging.vocabulary import Decision, Statement
from registry.events import NETWORK
from registry.evidence import Evidence, flatten
from registry.guardian import DIGEST, promoting
from registry.ledger import Ledger
from registry.package import read_contract, statements_folder
from registry.state import FOLDS

NOTICE = "Research use only; simulated sites."
SILENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}  # fmt: skip
PLACES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")


def tracking_uri(var: Path) -> str:
    """MLFLOW_TRACKING_URI, or the sqlite database under var/mlflow."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{var.resolve()}/mlflow/mlflow.db"


def open_store(var: Path) -> Any:
    """MLflow's client, no telemetry.

    Returns:
        mlflow.MlflowClient.

    Raises:
        RegistryError: the server or database does not answer.
    """
    os.environ.update(SILENT)
    import logging
    import warnings

    import mlflow

    warnings.filterwarnings("ignore", module="mlflow")

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    (var / "mlflow").mkdir(parents=True, exist_ok=True)
    given, place = {name: os.environ.get(name) for name in PLACES}, tracking_uri(var)
    mlflow.set_tracking_uri(place)
    mlflow.set_registry_uri(place)
    for name in PLACES:  # MLflow tells them to every child process; another var has another database
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in given.items() if value is not None})
    client = mlflow.MlflowClient()
    try:
        client.search_registered_models(max_results=1)
    except mlflow.exceptions.MlflowException as error:
        raise RegistryError(
            f"MLflow at {tracking_uri(var)} does not answer.",
            "Start it (`make up`), or unset MLFLOW_TRACKING_URI.",
        ) from error
    return client


@contextmanager
def mirroring(var: Path) -> Iterator[Any]:
    """MLflow's client for the one process that may write the mirror now; others wait for it.

    Raises:
        RegistryError: MLflow does not answer, or refuses.
    """
    (var / "mlflow").mkdir(parents=True, exist_ok=True)
    with (var / "mlflow" / "mirror.lock").open("w") as lock, promoting(var):
        flock(lock, LOCK_EX)
        client = open_store(var)
        from mlflow.exceptions import MlflowException

        try:
            yield client
        except MlflowException as error:
            raise RegistryError(
                f"MLflow did not take what the ledger says: {str(error)[:300]}",
                "Nothing is lost: the next `formulary registry mirror` tries again.",
            ) from error


def log_version(client: Any, package: Path, evidence: Evidence, number: int, logged: Any = None) -> int:
    """Give MLflow a version: its run, metrics, data sets, model and tags.

    Args:
        client: MLflow's.
        package: its folder on the shelf.
        evidence: of the package.
        number: by the ledger.
        logged: MLflow's ModelVersion of it, when only the version is to be made anew.

    Returns:
        The number that MLflow gave it.
    """
    contract = read_contract(package)
    _experiment(client, package, contract.task)
    model, run = (logged.source, logged.run_id) if logged else _log_run(client, package, evidence, number)
    if not client.search_registered_models(f"name = '{contract.task}'"):
        client.create_registered_model(contract.task, description=contract.title)
    told = f"{contract.intended_use} {NOTICE} {contract.simulated}"
    tags, name = describe_evidence(evidence), model.removeprefix("models:/")
    made = client.create_model_version(contract.task, model, run, tags, None, told, model_id=name)
    return int(made.version)


def server_command(var: Path, port: int) -> list[str]:
    """The command line of an MLflow server on loopback over the same database, behind `registry.guardian`."""
    artefacts = var.resolve() / "mlflow" / "artifacts"
    uri = f"sqlite:///{var.resolve()}/mlflow/mlflow.db"
    return ["mlflow", "server", "--app-name", "formulary", "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1", "--backend-store-uri", uri,
            "--default-artifact-root", artefacts.as_uri()]  # fmt: skip


def _log_run(client: Any, package: Path, evidence: Evidence, number: int) -> tuple[str, str]:
    """Log everything but the version; the address of the model, and the run."""
    import mlflow

    made = evidence.body(Statement.PACKAGE)
    with mlflow.start_run(run_name=f"{made['task']} v{number}") as run:
        params = flatten(made["params"])
        mlflow.log_params({name: str(value)[:500] for name, value in params.items()})
        mlflow.set_tags(describe_evidence(evidence))
        mlflow.log_artifacts(str(statements_folder(package)), "statements")
        model = _log_model(package)
        digests = _log_cohorts(evidence)
        metrics = list_metrics(evidence, digests, (model, run.info.run_id))
        for start in range(0, len(metrics), 1000):  # MLflow takes so many at once
            client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])
    client.set_logged_model_tags(model, describe_evidence(evidence))
    return f"models:/{model}", run.info.run_id


def _experiment(client: Any, package: Path, task: str) -> None:
    import mlflow

    if client.get_experiment_by_name(task) is None:
        artefacts = package.parent.parent / "mlflow" / "artifacts" / task
        client.create_experiment(task, artifact_location=artefacts.resolve().as_uri())
    mlflow.set_experiment(task)


def _log_model(package: Path) -> str:
    """Models-from-code: the face, with the package's files as artefacts; no pickle anywhere."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    contract = read_contract(package)
    shape = (-1, *contract.stored_shape)
    signature = ModelSignature(inputs=Schema([TensorSpec(np.dtype("float32"), shape)]))
    here = Path(__file__).parent
    files = {"model": package / "model.onnx", "contract": package / "contract.json",
             "preparation": here.parent / "imaging" / "preparation.py"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name in ("weights.safetensors", "reference.parquet", "golden.npz"):
            files[name.split(".")[0]] = package / name
        face = Path(folder) / "face.py"
        face.write_bytes((here / "face.py").read_bytes())
        info = mlflow.pyfunc.log_model(
            name=contract.task, python_model=str(face),
            artifacts={name: str(path) for name, path in files.items()},
            signature=signature, pip_requirements=["mlflow", "numpy", "openvino", "pydantic"],
        )  # fmt: skip
    return str(info.model_id)


def list_metrics(evidence: Evidence, digests: dict[str, str], source: tuple[str, str]) -> list[Any]:
    """The training's history, and every score with both ends of its interval.

    Names are `overall.auc`, `north.auc.low`, `subgroup.sex.F.auc.high`, `robustness.noise.drop` (the step is
    its severity) and `robustness.held_out.drop`. Overall scores name the locked set; all name the model.
    """
    from mlflow.entities import Metric

    model, run = source
    history = evidence.body(Statement.PACKAGE)["history"]["epochs"]
    metrics = [
        Metric(name, float(value), 0, int(epoch["epoch"]))
        for epoch in history for name, value in epoch.items()
        if name != "epoch" and isinstance(value, int | float)
    ]  # fmt: skip
    for name, step, score in _scores(evidence.body(Statement.EVALUATION)):
        label = re.sub(r"[^\w\-./ ]", "_", name.replace("+", " or more"))  # MLflow takes no other characters
        known = name.startswith("overall.") and "test" in digests
        data = ("test", digests["test"]) if known else (None, None)
        ends = {"": score.get("estimate"), ".low": score.get("low"), ".high": score.get("high")}
        metrics += [
            Metric(label + end, float(value), 0, step, model, *data, run)
            for end, value in ends.items() if isinstance(value, int | float)
        ]  # fmt: skip
    return metrics


def _scores(told: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, step, score) of everything in an evaluation statement that has an interval."""
    groups = {
        f"subgroup.{kind}.{name}": scores
        for kind, found in told.get("subgroups", {}).items() for name, scores in found.items()
    }  # fmt: skip
    for where, scores in {"overall": told["overall"], **told["sites"], **groups}.items():
        yield from ((f"{where}.{name}", 0, score) for name, score in scores.items())
    robustness = told.get("robustness") or {"cells": [], "groups": {}}
    named = [(cell["family"], int(cell["severity"]), cell) for cell in robustness["cells"]]
    named += [(name, 0, scores) for name, scores in robustness["groups"].items()]
    for name, step, scores in named:
        measured = {metric: score for metric, score in scores.items() if isinstance(score, dict)}
        yield from ((f"robustness.{name}.{metric}", step, score) for metric, score in measured.items())


def _log_cohorts(evidence: Evidence) -> dict[str, str]:
    """The locked sets as MLflow datasets; full digests are tags, MLflow's own are cut at 36 characters.

    Returns:
        Name of the set -> the digest by which MLflow knows it.
    """
    import mlflow
    import pandas as pd

    task = evidence.body(Statement.PACKAGE)["task"]
    digests = {}
    for name, facts in evidence.body(Statement.EVALUATION)["sets"].items():
        table = pd.DataFrame([{"images": facts["images"], "subjects": facts["subjects"]}])
        digests[name] = str(facts["digest"]).removeprefix("sha256:")[:36]
        dataset = mlflow.data.from_pandas(
            table, source=f"build/{task}/split/manifest.parquet", digest=digests[name], name=name
        )
        mlflow.log_input(dataset, context=name)
    return digests


def describe_evidence(evidence: Evidence) -> dict[str, str]:
    """Tags of a version that do not change: commit, digests of package, cohorts, stages and environment."""
    made, scores = evidence.body(Statement.PACKAGE), evidence.body(Statement.EVALUATION)
    tags = {DIGEST: evidence.digest, "commit": made["commit"], "modified": str(made["modified"]),
            "dvc_lock": made["dvc_lock"], "requirements": made["environment"]["requirements"],
            "notice": NOTICE}  # fmt: skip
    sets = {f"cohort.{name}": facts["digest"] for name, facts in scores["sets"].items()}
    stages = {
        f"dvc.{path.split('/')[-1]}": md5
        for outs in made["stages"].values() for path, md5 in outs.items() if path.startswith("build/")
    }  # fmt: skip
    return tags | sets | stages


def describe_decisions(ledger: Ledger, task: str) -> dict[int, dict[str, str]]:
    """Version -> tags that move with the ledger: `gate.network`, `gate.site.NAME`, `approver`, `status`."""
    told: dict[int, dict[str, str]] = {}
    for event in ledger.events(task):
        if "version" in event.body and event.kind in (Decision.REGISTERED, *FOLDS):
            tags = told.setdefault(int(event.body["version"]), {})
            tags |= {"status": event.kind} | _describe_verdict(event.body.get("verdict"))
            if event.kind == Decision.APPROVED:
                tags["approver"] = event.actor
    state = ledger.state(task)
    held: dict[int, list[str]] = {}
    for site, slots in state.slots().items():
        where = ("network" if site == NETWORK else site) + " (suspended)" * bool(state.stopped(site))
        for slot, placement in slots.items():
            held.setdefault(placement.version, []).append(f"{slot}: {where}")
    for version, places in held.items():
        told[version]["status"] = ", ".join(places)
    return told


def _describe_verdict(verdict: dict[str, Any] | None) -> dict[str, str]:
    if not verdict:
        return {}
    places = {"gate.network": verdict["network"]}
    places |= {f"gate.site.{site}": found for site, found in verdict["sites"].items()}
    return {
        place: f"{'passed' if found['passed'] else 'refused'}: {'; '.join(found['reasons'])}"[:1000]
        for place, found in places.items()
    }
