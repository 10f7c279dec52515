"""From weights to a package: the same bytes in every clean run, and no code of ours needed to run it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from imaging.config import Places
from imaging.errors import DataError
from imaging.image import describe
from imaging.recipe import TaskSection
from imaging.vocabulary import Split
from monitoring.reference import name_columns, summarise, write_reference
from registry.architectures import build
from registry.engines import OUTPUTS, check_answers, check_parity, open_engine
from registry.package import Contract, digest_package, write_contract
from training.datasets import Dataset, load_split, stage_folder

MADE_UP = "The golden images are simulated noise: no validation image may be redistributed."


def export(places: Places, task: str, section: TaskSection) -> str:
    """Write the package of a task.

    Returns:
        Its digest.

    Raises:
        DataError: the network cannot be exported.
        TrustError: the engine that will be scored does not answer as the network does.
    """
    folder = stage_folder(places, task, "package")
    every = load_split(places, task, section, Split.VALIDATION, Split.EXTERNAL)
    data = every.take((every.rows["split"] == Split.VALIDATION).to_numpy())
    shutil.copy(places.stage(task, "fit") / "weights.safetensors", folder)
    network = _load(folder, section, data.images.shape[1:])
    contract = _contract(places, task, section, data)
    write_contract(contract, folder)
    _export_graphs(network, contract, folder)
    _write_golden(network, data, section.package.golden, folder)
    engine = open_engine(folder, section.evaluate.engine, section.evaluate.precision, section.fit.threads)
    check_parity(engine, folder, contract)
    write_reference(_describe(every, engine, contract), name_columns(contract), folder / "reference.parquet")
    return digest_package(folder)


def _load(folder: Path, section: TaskSection, shape: tuple[int, ...]) -> Any:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(section.fit.threads)
    network = build(section.fit.architecture, shape, len(section.classes), section.positive_labels)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return network.eval()


def _contract(places: Places, task: str, section: TaskSection, data: Dataset) -> Contract:
    calibration = json.loads((places.stage(task, "calibrate") / "calibration.json").read_text())
    cohort = yaml.safe_load((places.stage(task, "cohort") / "cohort.yaml").read_text())
    # What is measured of a finished package is no part of it: editing those sections must not rename it.
    made_from = section.model_dump(mode="json", exclude={"qualify", "reference"})
    params = json.dumps(made_from, sort_keys=True)
    limits = [*cohort.get("limits", ()), *([] if data.rows["redistributable"].any() else [MADE_UP])]
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
        simulated=str(cohort["simulation"]), limits=tuple(limits),
        lineage={"cohort": digest_cohort(places, task), "params": "sha256:" + _sha256(params.encode())},
    )  # fmt: skip


def digest_cohort(places: Places, task: str) -> str:
    """sha256 over subject, split, label and image digest of every row: the cohort as it was split."""
    import pandas as pd

    table = pd.read_parquet(
        places.stage(task, "split") / "manifest.parquet", columns=["subject", "split", "label", "sha256"]
    )
    return "sha256:" + _sha256("\n".join(",".join(row) for row in table.astype(str).to_numpy()).encode())


def _export_graphs(network: Any, contract: Contract, folder: Path) -> None:
    """program.pt2 and model.onnx, both giving logits, heat and embedding, for any batch that is promised."""
    import torch

    for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    batch = torch.export.Dim("batch", min=1, max=contract.max_batch)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        example = (torch.zeros(2, *contract.shape),)
        program = torch.export.export(network, example, dynamic_shapes=({0: batch},))
        _strip(program)
        torch.export.save(program, folder / "program.pt2")
        made = torch.onnx.export(
            program, (), input_names=["image"], output_names=list(OUTPUTS), external_data=False, verbose=False
        )
    if made is None:
        raise DataError("The network cannot be exported to ONNX.", "See the exporter's message above.")
    model = made.model_proto
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


def _strip(program: Any) -> None:
    """Take out what differs from run to run: stack traces, the order of ranges, the example's pixels."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if hasattr(module, "graph") else ():
            node.meta.pop("stack_trace", None)
            node.meta.pop("nn_module_stack", None)
            node.meta.pop("source_fn_stack", None)
    ranges = sorted(program._range_constraints.items(), key=lambda item: str(item[0]))
    program._range_constraints = dict(ranges)
    program._example_inputs = None


def _write_golden(network: Any, data: Dataset, count: int, folder: Path) -> None:
    """Cases with the network's own logits: of the validation set, where they may be redistributed.

    Where none may be, they are simulated: noise of the images' own mean and spread at each pixel.
    """
    import torch

    allowed = np.flatnonzero(data.rows["redistributable"].to_numpy(dtype=bool))
    if len(allowed):
        chosen = np.unique(allowed[np.linspace(0, len(allowed) - 1, min(count, len(allowed))).astype(int)])
        images = data.images[chosen]
    else:
        sample = data.images[:256]
        drawn = np.random.default_rng(0).normal(size=(count, *sample.shape[1:]))
        images = (sample.mean(axis=0) + sample.std() * drawn).clip(-1.5, 1.5).astype(np.float32)
    with torch.inference_mode():
        logits = network(torch.from_numpy(images))[0].numpy()
    with zipfile.ZipFile(folder / "golden.npz", "w", zipfile.ZIP_STORED) as archive:
        for name, values in (("images", images), ("logits", logits)):
            stream = io.BytesIO()
            np.save(stream, values, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), stream.getvalue())  # its date is fixed: 1980


def _describe(data: Dataset, engine: Any, contract: Contract) -> list[dict[str, Any]]:
    """The reference's rows: what serving will journal of the same images, by the same functions."""
    from rich.console import Console
    from rich.progress import track

    rows = []
    starts, console = range(0, len(data.images), contract.max_batch), Console(stderr=True)
    facts = data.rows[["sha256", "subject", "site", "split"]].to_dict("records")
    for start in track(starts, description=f"describe {contract.title}", console=console):
        images = data.images[start : start + contract.max_batch]
        answers = engine.run(images)
        check_answers(answers, contract, len(images))
        told = zip(images, contract.probabilities(answers.logits), facts[start:], strict=False)
        for image, answer, fact in told:
            rows.append({**fact, **describe(image), **summarise(contract, answer)})
    return rows


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
