"""A package as a MONAI bundle: TorchScript and configuration, which need MONAI and no code of ours."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from imaging.errors import DataError, TrustError
from imaging.preparation import Colour, Window
from imaging.vocabulary import Kind
from registry.package import Contract, digest_package, read_contract, read_golden

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
NEEDED = {"pytorch-ignite": "0.4.11", "fire": "0.4.0", "nibabel": "4.0.1"}  # beside MONAI, at least
OWN = "formulary"  # the key of metadata.json where the whole contract stands


def export_bundle(package: Path, target: Path) -> Path:
    """Write a package as a MONAI bundle, a folder that `python -m monai.bundle run` runs.

    Its network answers with calibrated logits: of a detector those of the centres alone. The contract stands
    in metadata.json under `formulary`; models/model.onnx is the package's own, with heat and embedding.

    Args:
        package: its folder. Verify it first: program.pt2 can hide code.
        target: the folder to make.

    Raises:
        DataError: the folder exists.
        TrustError: the package has no program, or TorchScript does not answer the golden cases as it does.
    """
    contract, digest = read_contract(package), digest_package(package)
    if target.exists():
        raise DataError(f"{target} exists.", "Name another folder.")
    if not (package / "program.pt2").exists():
        raise TrustError(f"The package {digest[:19]} came as ONNX and has no program that MONAI could run.",
                         "Hand on the file or bundle that it was imported from.")  # fmt: skip
    draft = target.with_name(target.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    for name in ("configs", "models", "docs"):
        (draft / name).mkdir(parents=True)
    _write_script(package, contract, draft / "models" / "model.ts")
    shutil.copy(package / "model.onnx", draft / "models")
    files = {"metadata": _describe(contract, digest), "inference": _configure(contract)}
    for name, told in files.items():
        (draft / "configs" / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    (draft / "docs" / "README.md").write_text(_introduce(contract, digest))
    (draft / "LICENSE").write_text(
        f"Package {digest}\n\nThis file grants no licence. The model belongs to whoever trained it: ask them "
        f"before you use it.\nFor research only, until a regulator has cleared it. {contract.intended_use}\n"
    )
    draft.rename(target)
    return target


def _write_script(package: Path, contract: Contract, path: Path) -> None:
    """TorchScript of the program's calibrated logits, for any number of images."""
    import torch

    program = torch.export.load(package / "program.pt2").module(check_guards=False)
    program._forward_pre_hooks.clear()  # it checks shapes, which TorchScript cannot trace
    _let_sizes_vary(program)

    class Calibrated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program = program

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.program(image)[0] / contract.temperature
            return logits[:, :1] if contract.kind is Kind.DETECTION else logits

    golden = read_golden(package)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(Calibrated(), (torch.zeros(2, *contract.shape),), check_trace=False)  # type: ignore[no-untyped-call]
        script.save(str(path))
        answers = np.concatenate([script(torch.from_numpy(image[None])).numpy() for image in golden.images])
    expected = golden.logits / np.float32(contract.temperature)
    if not np.allclose(answers, expected[:, : answers.shape[1]], rtol=1e-3, atol=1e-3):
        raise TrustError(
            f"TorchScript of {contract.task} differs from its golden answers.", "Do not export it."
        )


def _let_sizes_vary(program: Any) -> None:
    """Give sizes to tensors' own methods: `aten` operators would trace the example's batch as a constant."""
    import torch

    for node in program.graph.nodes:
        sized = any(isinstance(one.meta.get("val"), torch.SymInt) for one in node.all_input_nodes)
        if node.target is torch.ops.aten.sym_size.int:
            node.target = torch.Tensor.size
        elif sized and isinstance(node.target, torch._ops.OpOverload):
            node.target = getattr(torch.Tensor, node.target.overloadpacket.__name__)
    program.recompile()


def _describe(contract: Contract, digest: str) -> dict[str, Any]:
    """metadata.json, by MONAI's schema of July 2024."""
    name = f"0.1.0+{digest[7:19]}"
    return {
        "schema": SCHEMA, "version": name, "changelog": {name: f"Package {digest}"},
        "monai_version": version("monai"), "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"), "required_packages_version": NEEDED,
        "name": contract.title, "task": contract.title,
        "description": " ".join((contract.intended_use, *contract.limits)),
        "authors": f"Whoever signed package {digest}", "copyright": "Not told: ask the authors",
        "intended_use": contract.intended_use, "data_source": contract.simulated, "data_type": "numpy",
        "network_data_format": _describe_tensors(contract), OWN: contract.model_dump(mode="json"),
    }  # fmt: skip


def _describe_tensors(contract: Contract) -> dict[str, Any]:
    limit = 1.5 if contract.preparation.kind == "percentiles" else 1.0
    names = ("red", "green", "blue") if contract.channels == 3 else ("image",)
    image = {"type": "image", "format": "magnitude", "modality": str(contract.modality),
             "num_channels": contract.channels, "spatial_shape": list(contract.spatial), "dtype": "float32",
             "value_range": [-limit, limit], "is_patch_data": False,
             "channel_def": {str(i): name for i, name in enumerate(names)}}  # fmt: skip
    classes, spatial = contract.classes, list(contract.spatial)
    if contract.kind is Kind.DETECTION:
        classes, spatial = (f"centre of {contract.classes[1]}",), [side // 4 for side in spatial]
    pred = {"type": "image", "format": "classes", "num_channels": len(classes), "spatial_shape": spatial,
            "dtype": "float32", "value_range": [], "is_patch_data": False,
            "channel_def": {str(i): name for i, name in enumerate(classes)}}  # fmt: skip
    if contract.kind is Kind.CLASSIFICATION:
        pred |= {"type": "probabilities", "spatial_shape": []}
    return {"inputs": {"image": image}, "outputs": {"pred": pred}}


def _configure(contract: Contract) -> dict[str, Any]:
    """inference.json: every .npy of a folder is answered; probabilities become CSV or NIfTI."""
    detects, classifies = contract.kind is Kind.DETECTION, contract.kind is Kind.CLASSIFICATION
    activate = {"_target_": "Activationsd", "keys": "pred", "sigmoid": detects, "softmax": not detects}
    name_image = "$lambda batch: [case['image'].meta for case in batch]"
    taken = "$monai.handlers.from_engine(['pred'])"
    table = {"_target_": "ClassificationSaver", "output_dir": "@output_dir", "batch_transform": name_image,
             "output_transform": taken}  # fmt: skip
    volume = {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "resample": False,
              "separate_folder": False, "output_postfix": "probabilities"}  # fmt: skip
    tables, volumes = ([table], []) if classifies else ([], [volume])
    return {
        "imports": ["$import glob", "$import torch"], "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'", "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {"_target_": "torch.jit.load", "f": "$@bundle_root + '/models/model.ts'",
                        "map_location": "@device"},
        "preprocessing": {"_target_": "Compose", "transforms": _prepare(contract)},
        "dataset": {"_target_": "Dataset", "transform": "@preprocessing",
                    "data": "$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*.npy'))]"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {"_target_": "Compose", "transforms": [activate, *volumes]},
        "handlers": tables,
        "evaluator": {"_target_": "SupervisedEvaluator", "device": "@device", "network": "@network_def",
                      "val_data_loader": "@dataloader", "inferer": "@inferer",
                      "postprocessing": "@postprocessing", "val_handlers": "@handlers"},
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def _prepare(contract: Contract) -> list[dict[str, Any]]:
    """imaging.preparation in MONAI's transforms."""
    how, keys = contract.preparation, {"keys": "image"}
    channel = -1 if contract.channels == 3 else "no_channel"
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", **keys, "reader": "NumpyReader"},
        {"_target_": "EnsureChannelFirstd", **keys, "channel_dim": channel},
        {"_target_": "EnsureTyped", **keys, "dtype": "$torch.float32"},
    ]
    scaled = {**keys, "b_min": -1.0, "b_max": 1.0}
    if isinstance(how, Window | Colour):
        low, high = (how.low_hu, how.high_hu) if isinstance(how, Window) else (0.0, 255.0)
        limits = {"a_min": low, "a_max": high, "clip": True}
        return [*steps, {"_target_": "ScaleIntensityRanged", **scaled, **limits}]
    steps.append(
        {"_target_": "ScaleIntensityRangePercentilesd", **scaled, "lower": how.low, "upper": how.high}
    )
    for limit in (-1.5, 1.5):
        steps.append(
            {"_target_": "ThresholdIntensityd", **keys, "threshold": limit, "above": limit < 0, "cval": limit}
        )
    return steps


def _introduce(contract: Contract, digest: str) -> str:
    """README.md."""
    shape = ", ".join(map(str, contract.stored_shape))
    names = ", ".join(f"{number} {name}" for number, name in enumerate(contract.classes))
    answer = {
        Kind.CLASSIFICATION: f"predictions.csv: file, then the probability of each class ({names}); positive "
                             f"where {', '.join(contract.positive)} reaches {contract.threshold:g}.",
        Kind.SEGMENTATION: f"one NIfTI an image: the probability of each class ({names}), last axis.",
        Kind.DETECTION: f"one NIfTI an image: the probability of a centre of {contract.classes[1]} at every "
                        f"fourth pixel; it counts from {contract.threshold:g}. Sizes are left out.",
    }[contract.kind]  # fmt: skip
    limits = "".join(f"- {limit}\n" for limit in (contract.simulated, *contract.limits) if limit)
    return f"""# {contract.title}

{contract.intended_use}

Package {digest}. It needs MONAI, {", ".join(NEEDED)}, and no other code.

    python -m monai.bundle run --config_file configs/inference.json --dataset_dir FOLDER

FOLDER holds {contract.modality} images as .npy of shape ({shape}), rows from top to bottom, of
{contract.spacing_low_mm:g} to {contract.spacing_high_mm:g} mm. What is answered lies in eval/:

{answer}

Probabilities are calibrated. models/model.onnx takes the prepared image and answers with uncalibrated logits,
a heat map and an embedding; the contract stands in configs/metadata.json under `{OWN}`.

{limits}"""
