"""MLflow, the mirror: versions, metrics, lineage and aliases for people who only know MLflow.

Nothing is decided here. Everything is written from the ledger and the signed statements, so a lost MLflow
database is filled again by `formulary registry register`. The only owner of mlflow.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from imaging.errors import RegistryError
from imaging.vocabulary import Statement
from registry.events import NETWORK
from registry.evidence import Evidence, verify_package
from registry.ledger import Ledger
from registry.package import read_contract, shelf, statements_folder

DIGEST = "package_digest"
SILENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
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


def mirror_versions(var: Path, ledger: Ledger, task: str) -> list[int]:
    """Log every version of a task that MLflow lacks, oldest first, and its aliases.

    Returns:
        Numbers of the versions that were logged.

    Raises:
        RegistryError: MLflow holds other versions under these numbers.
        TrustError: a package does not hold any more.
    """
    client = open_store(var)
    present = _present(client, task)
    logged = []
    for _, number, digest, _ in ledger.versions(task):
        if number in present:
            _same(task, number, digest, present[number])
            continue
        evidence = verify_package(shelf(var, digest), ledger)
        _log_version(client, shelf(var, digest), evidence, number)
        logged.append(number)
    if logged:
        for site, placement in {NETWORK: None, **ledger.champions(task)}.items():
            held = placement or ledger.slots(task).get(NETWORK, {}).get("champion")
            if held:
                _set_alias(client, task, site, held.version)
    return logged


def drain(var: Path, ledger: Ledger) -> list[str]:
    """Carry the ledger's moves to MLflow's aliases, oldest first; each row is settled once MLflow has it.

    Returns:
        What was set, e.g. `brain-tissue@champion = 2`.

    Raises:
        RegistryError: MLflow does not answer, or does not know the version.
    """
    rows = ledger.pending()
    if not rows:
        return []
    client = open_store(var)
    told = []
    for row, task, site, version in rows:
        _set_alias(client, task, site, version)
        ledger.settle(row)
        told.append(f"{task}@{alias_of(site)} = {version}")
    return told


def alias_of(site: str) -> str:
    """MLflow's name of a champion's slot: `champion`, or `champion--site` (MLflow refuses @)."""
    return "champion" if site == NETWORK else f"champion--{site}"


def server_command(var: Path, port: int) -> list[str]:
    """The command line of an MLflow server on loopback over the same database."""
    artefacts = var.resolve() / "mlflow" / "artifacts"
    uri = f"sqlite:///{var.resolve()}/mlflow/mlflow.db"
    return ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", uri, "--default-artifact-root", artefacts.as_uri()]  # fmt: skip


def _set_alias(client: Any, task: str, site: str, version: int) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(task, alias_of(site), str(version))
    except MlflowException as error:
        raise RegistryError(
            f"MLflow does not take {task} v{version} as {alias_of(site)}.",
            "If its database was lost, `formulary registry register` fills it again.",
        ) from error


def _present(client: Any, task: str) -> dict[int, str]:
    found = client.search_model_versions(f"name='{task}'", max_results=1000)
    return {int(version.version): str(version.tags.get(DIGEST, "")) for version in found}


def _same(task: str, number: int, digest: str, told: str) -> None:
    if told != digest:
        raise RegistryError(
            f"MLflow holds another package as {task} v{number}.",
            "Move var/mlflow aside and run `formulary registry register`: the ledger fills it again.",
        )


def _log_version(client: Any, package: Path, evidence: Evidence, number: int) -> None:
    import mlflow

    made = evidence.body(Statement.PACKAGE)
    contract = read_contract(package)
    _experiment(client, package, contract.task)
    with mlflow.start_run(run_name=f"{contract.task} v{number}") as run:
        mlflow.log_params(_flatten(made["params"]))
        _log_metrics(client, run.info.run_id, evidence)
        _log_cohorts(evidence)
        mlflow.set_tags(_tags(evidence))
        mlflow.log_artifacts(str(statements_folder(package)), "statements")
        info = _log_model(package)
    version = mlflow.register_model(info.model_uri, contract.task, tags=_tags(evidence))
    if int(version.version) != number:
        raise RegistryError(
            f"MLflow calls {contract.task} v{number} v{version.version}.",
            "A version was deleted in MLflow: move var/mlflow aside and register again.",
        )
    client.update_model_version(contract.task, str(number), contract.intended_use)


def _experiment(client: Any, package: Path, task: str) -> None:
    import mlflow

    if client.get_experiment_by_name(task) is None:
        artefacts = package.parent.parent / "mlflow" / "artifacts" / task
        client.create_experiment(task, artifact_location=artefacts.resolve().as_uri())
    mlflow.set_experiment(task)


def _log_model(package: Path) -> Any:
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
        return mlflow.pyfunc.log_model(
            name="model", python_model=str(face), artifacts={name: str(path) for name, path in files.items()},
            signature=signature, pip_requirements=["mlflow", "numpy", "openvino", "pydantic"],
        )  # fmt: skip


def _log_metrics(client: Any, run: str, evidence: Evidence) -> None:
    from mlflow.entities import Metric

    history = evidence.body(Statement.PACKAGE)["history"]["epochs"]
    metrics = [
        Metric(name, float(value), 0, int(epoch["epoch"]))
        for epoch in history for name, value in epoch.items()
        if name != "epoch" and isinstance(value, int | float)
    ]  # fmt: skip
    scores = evidence.body(Statement.EVALUATION)
    for where, told in {"overall": scores["overall"], **scores["sites"]}.items():
        for name, score in told.items():
            ends = {"": score["estimate"], ".low": score["low"], ".high": score["high"]}
            metrics += [Metric(f"{where}.{name}{end}", float(value), 0, 0) for end, value in ends.items()]
    client.log_batch(run, metrics=metrics)


def _log_cohorts(evidence: Evidence) -> None:
    """The locked sets as MLflow datasets; full digests are tags, MLflow's own are cut at 36 characters."""
    import mlflow
    import pandas as pd

    task = evidence.body(Statement.PACKAGE)["task"]
    for name, facts in evidence.body(Statement.EVALUATION)["sets"].items():
        table = pd.DataFrame([{"images": facts["images"], "subjects": facts["subjects"]}])
        digest = str(facts["digest"]).removeprefix("sha256:")[:36]
        dataset = mlflow.data.from_pandas(
            table, source=f"build/{task}/split/manifest.parquet", digest=digest, name=name
        )
        mlflow.log_input(dataset, context=name)


def _tags(evidence: Evidence) -> dict[str, str]:
    made, scores = evidence.body(Statement.PACKAGE), evidence.body(Statement.EVALUATION)
    tags = {DIGEST: evidence.digest, "commit": made["commit"], "modified": str(made["modified"]),
            "dvc_lock": made["dvc_lock"], "requirements": made["environment"]["requirements"],
            "notice": "research use only; simulated sites"}  # fmt: skip
    sets = {f"cohort.{name}": facts["digest"] for name, facts in scores["sets"].items()}
    stages = {
        f"dvc.{path.split('/')[-1]}": md5
        for outs in made["stages"].values() for path, md5 in outs.items() if path.startswith("build/")
    }  # fmt: skip
    return tags | sets | stages


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:500]
    return flat
