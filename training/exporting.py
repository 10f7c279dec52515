"""From weights to a package: the same bytes in every clean run, and no code of ours needed to run it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from imaging.config import Places
from imaging.errors import DataError
from imaging.image import describe
from imaging.recipe import TaskSection
from imaging.vocabulary import Split
from monitoring.reference import name_columns, summarise, write_reference
from registry.architectures import build
from registry.engines import check_answers, check_parity, open_engine
from registry.graphs import export_graphs
from registry.imports import check_contract, list_params, read_import
from registry.package import FILES, Contract, digest_package, write_contract
from registry.projection import fit_projection, write_projection
from training.calibration import choose_point
from training.datasets import Dataset, load_split, stage_folder

Answer = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # images to logits

FOREIGN = "It was trained elsewhere, and this registry has not seen on what. It is told: {told}"
MADE_UP = "The golden images are simulated noise: no validation image may be redistributed."


def export(places: Places, task: str, section: TaskSection, imported: Path | None = None) -> str:
    """Write the package of a task, of its own training or of an import.

    Args:
        places: of the checkout.
        task: its name.
        section: of params.yaml.
        imported: a folder that `registry.imports.import_model` made, in place of `fit` and `calibrate`.

    Returns:
        Its digest.

    Raises:
        DataError: the network cannot be exported.
        TrustError: the engine that will be scored does not answer as the network does.
    """
    folder = stage_folder(places, task, "package")
    every = load_split(places, task, section, Split.VALIDATION, Split.EXTERNAL)
    data = every.take((every.rows["split"] == Split.VALIDATION).to_numpy())
    for name in FILES:
        (folder / name).unlink(missing_ok=True)  # an import may have no program, and must not get another's
    if imported is None:
        contract = _contract(places, task, section, data)
        answer = _make(places.stage(task, "fit"), section, contract, folder)
    else:
        contract, answer = _adopt(imported, places, task, section, data)
    write_contract(contract, folder)
    _write_golden(answer, data, section.package.golden, folder)
    engine = open_engine(folder, section.evaluate.engine, section.evaluate.precision, section.fit.threads)
    check_parity(engine, folder, contract)
    rows = _describe(every, engine, contract, folder)
    write_reference(rows, name_columns(contract), folder / "reference.parquet")
    return digest_package(folder)


def _make(fitted: Path, section: TaskSection, contract: Contract, folder: Path) -> Answer:
    """Weights and graphs of the task's own network; and its logits of images."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(section.fit.threads)
    shutil.copy(fitted / "weights.safetensors", folder)
    network = build(section.fit.architecture, contract.shape, len(section.classes), section.positive_labels)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    export_graphs(network.eval(), contract, folder)

    def answer(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = network(torch.from_numpy(images))[0].numpy()
        return logits

    return answer


def _adopt(
    imported: Path, places: Places, task: str, section: TaskSection, data: Dataset
) -> tuple[Contract, Answer]:
    """The model of an import, and its contract; its operating point is frozen here, unless it was told."""
    found, folder = read_import(imported), places.stage(task, "package")
    names = {path.name for path in imported.iterdir()} & set(FILES)
    for name in names:
        shutil.copy(imported / name, folder)
    engine, size = open_engine(folder, "onnxruntime", "f32", section.fit.threads), found.contract["max_batch"]

    def answer(images: NDArray[np.float32]) -> NDArray[np.float32]:
        starts = range(0, len(images), size)
        return np.concatenate([engine.run(np.ascontiguousarray(images[i : i + size])).logits for i in starts])

    told = {**found.contract, **_describe_making(places, task, section, data, found.lineage)}
    told["limits"] = [FOREIGN.format(**found.lineage), *found.contract["limits"], *told["limits"]]
    if "threshold" not in told:
        point = choose_point(section, data.truth, answer(data.images))
        told |= {name: point[name] for name in ("temperature", "threshold")}
    contract = check_contract(task, section, told)
    if contract.shape != data.images.shape[1:]:
        raise DataError(
            f"The model takes images of {contract.shape}, and {task} has {data.images.shape[1:]}.",
            "Import it with the shape of the task's images.",
        )
    return contract, answer


def _contract(places: Places, task: str, section: TaskSection, data: Dataset) -> Contract:
    calibration = json.loads((places.stage(task, "calibrate") / "calibration.json").read_text())
    channels, *depth, rows, columns = data.images.shape[1:]
    return Contract(
        task=task, title=section.title, kind=section.kind, modality=section.modality, classes=section.classes,
        positive=tuple(section.classes[label] for label in section.positive_labels), channels=channels,
        depth=depth[0] if depth else 0, rows=rows, columns=columns,
        spacing_low_mm=section.check.spacing_low_mm,
        spacing_high_mm=section.check.spacing_high_mm, png_offset=section.package.png_offset,
        max_batch=section.package.max_batch, preparation=section.preparation,
        temperature=calibration["temperature"], threshold=calibration["threshold"],
        tolerance=section.package.tolerance, intended_use=section.package.intended_use,
        **_describe_making(places, task, section, data, {}),
    )  # fmt: skip


def _describe_making(
    places: Places, task: str, section: TaskSection, data: Dataset, lineage: dict[str, str]
) -> dict[str, Any]:
    """What a contract says of the cohort and of where the package comes from."""
    cohort = yaml.safe_load((places.stage(task, "cohort") / "cohort.yaml").read_text())
    # What is measured of a finished package is no part of it: editing those sections must not rename it.
    measured = ("qualify", "reference")
    made_from = {name: one for name, one in list_params(section, lineage).items() if name not in measured}
    params = _sha256(json.dumps(made_from, sort_keys=True).encode())
    limits = [*cohort.get("limits", ()), *([] if data.rows["redistributable"].any() else [MADE_UP])]
    lineage = {"cohort": digest_cohort(places, task), "params": f"sha256:{params}", **lineage}
    return {"simulated": str(cohort["simulation"]), "limits": tuple(limits), "lineage": lineage}


def digest_cohort(places: Places, task: str) -> str:
    """sha256 over subject, split, label and image digest of every row: the cohort as it was split."""
    import pandas as pd

    table = pd.read_parquet(
        places.stage(task, "split") / "manifest.parquet", columns=["subject", "split", "label", "sha256"]
    )
    return "sha256:" + _sha256("\n".join(",".join(row) for row in table.astype(str).to_numpy()).encode())


def _write_golden(answer: Answer, data: Dataset, count: int, folder: Path) -> None:
    """Cases with the network's own logits: of the validation set, where they may be redistributed.

    Where none may be, they are simulated: noise of the images' own mean and spread at each pixel.
    """
    allowed = np.flatnonzero(data.rows["redistributable"].to_numpy(dtype=bool))
    if len(allowed):
        chosen = np.unique(allowed[np.linspace(0, len(allowed) - 1, min(count, len(allowed))).astype(int)])
        images = data.images[chosen]
    else:
        sample = data.images[:256]
        drawn = np.random.default_rng(0).normal(size=(count, *sample.shape[1:]))
        images = (sample.mean(axis=0) + sample.std() * drawn).clip(-1.5, 1.5).astype(np.float32)
    logits = answer(images)
    with zipfile.ZipFile(folder / "golden.npz", "w", zipfile.ZIP_STORED) as archive:
        for name, values in (("images", images), ("logits", logits)):
            stream = io.BytesIO()
            np.save(stream, values, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), stream.getvalue())  # its date is fixed: 1980


def _describe(data: Dataset, engine: Any, contract: Contract, folder: Path) -> list[dict[str, Any]]:
    """The reference's rows: what serving will journal of the same images, by the same functions.

    The axes of embeddings are those of the internal validation images; projection.npz is written on the way.
    """
    from rich.console import Console
    from rich.progress import track

    rows, embeddings = [], []
    starts, console = range(0, len(data.images), contract.max_batch), Console(stderr=True)
    facts = data.rows[["sha256", "subject", "site", "split"]].to_dict("records")
    for start in track(starts, description=f"describe {contract.title}", console=console):
        images = data.images[start : start + contract.max_batch]
        answers = engine.run(images)
        check_answers(answers, contract, len(images))
        told = zip(images, contract.probabilities(answers.logits), facts[start:], strict=False)
        for image, answer, fact in told:
            rows.append({**fact, **describe(image), **summarise(contract, answer)})
        embeddings.append(answers.embedding)
    every = np.concatenate(embeddings)
    projection = fit_projection(every[[row["split"] == Split.VALIDATION for row in rows]])
    write_projection(projection, folder)
    return [{**row, **projection.apply(one)} for row, one in zip(rows, every, strict=True)]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
