"""The networks that are served, as registered and approved versions of a checkout that is thrown away.

Weights are drawn: speed does not depend on what a network knows. `small-cnn` is the lung-nodule network
(64 x 64 x 1), `densenet121` MONAI's DenseNet121 (224 x 224 x 3), each with its heat map and embedding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from imaging.config import Places, read_places
from imaging.image import describe
from imaging.vocabulary import ContentType
from monitoring.reference import name_columns, write_reference
from registry.access import Acting, admit
from registry.architectures import Head, build, classifier
from registry.graphs import export_graphs
from registry.ledger import open_ledger
from registry.package import Contract, digest_package, write_contract
from registry.promotion import approve, request
from registry.registration import register
from services.findings import encode

SITE, SMALL, DENSE = "north", "small-cnn", "densenet121"
LIKE = {SMALL: "lung-nodule", DENSE: "histology"}  # sections of params.yaml that they are made after
SIDES = {SMALL: 64, DENSE: 224}
QUALIFIED = {"passed": True, **dict.fromkeys(("difference", "edges", "flips", "crossings", "dice"), 0.0)}
TOLERANCE = dict.fromkeys(("openvino/f32", "openvino/bf16", "torch/f32"), 0.1)


def draw_payload(model: str) -> tuple[bytes, str]:
    """One image as a hospital sends it, and its content type: a CT slice as .npy, a stained tile as .png."""
    rng, side = np.random.default_rng(5), SIDES[model]
    if model == SMALL:
        return encode(
            rng.normal(-600, 60, (side, side)).astype(np.int16), ContentType.NPY, 2.5, "CT"
        ), ContentType.NPY
    coarse = rng.normal(0, 40, (side // 16, side // 16, 3)).repeat(16, 0).repeat(16, 1)
    tile = np.array([190, 140, 180]) + coarse + rng.normal(0, 4, coarse.shape)
    return encode(tile.clip(0, 255).astype(np.uint8), ContentType.PNG, 0.001, "SM"), ContentType.PNG


def make_root(folder: Path, model: str) -> Places:
    """A checkout in a new folder, with one network approved at its one site."""
    folder.mkdir()
    source = read_places().root
    params = yaml.safe_load((source / "params.yaml").read_text())
    section = params["tasks"][LIKE[model]]
    section["package"] |= {"tolerance": TOLERANCE, "max_batch": 32}
    (folder / "params.yaml").write_text(
        yaml.safe_dump({**params, "tasks": {model: section}}, sort_keys=False)
    )
    (folder / "sites.yaml").write_text(
        yaml.safe_dump({"sites": {SITE: {"kind": "internal", "title": "Benchmark"}}})
    )
    places = Places(root=folder, build=folder / "build", var=folder / "var")
    ledger = open_ledger(places.var)
    author, approver = (admit(places.var, ledger, f"{who}@bench") for who in ("author", "approver"))
    write_policy(places, model)
    write_stages(places, model, section)
    version = register(places, ledger, model, author).version
    request(Acting(places, ledger, author), model, version)
    approve(Acting(places, ledger, approver, "It is to be measured."), model, version)
    return places


def write_policy(places: Places, task: str) -> None:
    """One that anything passes: what a network knows is not measured here."""
    bounds = {"subjects": 1, "low": {"auc": 0.0}}
    policy = {"task": task, "why": "A benchmark.", "primary": "auc",
              "network": {**bounds, "margin": {"auc": 1.0}}, "internal": bounds, "external": bounds,
              "statements": ["package", "evaluation", "qualification", "alarms"]}  # fmt: skip
    places.policies.mkdir(parents=True, exist_ok=True)
    (places.policies / f"{task}.yaml").write_text(yaml.safe_dump(policy))


def make_network(task: str, section: dict[str, Any]) -> Any:
    """Its weights drawn, and its normalisations set to what they see."""
    import torch

    from imaging.recipe import Architecture

    torch.manual_seed(7)
    torch.set_num_threads(1)
    if task == SMALL:
        network = build(Architecture.model_validate(section["fit"]["architecture"]), (1, 64, 64), 2, (1,))
    else:
        from monai.networks.nets import DenseNet121

        features = DenseNet121(spatial_dims=2, in_channels=3, out_channels=2).features
        features.add_module("relu5", torch.nn.ReLU())
        network = classifier(features, (1024,), Head(2, (1,), 0.0, imagenet=True))
    shape = (8, 1, 64, 64) if task == SMALL else (8, 3, 224, 224)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        network.train()(torch.rand(shape) * 2 - 1)
    return network.eval()


def write_stages(places: Places, task: str, section: dict[str, Any]) -> None:
    """What the pipeline would have left: a package, and a statement of each stage about it."""
    import torch
    from safetensors.torch import save_file

    network, contract = make_network(task, section), make_contract(task, section)
    package, digest = places.stage(task, "package"), ""
    package.mkdir(parents=True)
    save_file(network.state_dict(), package / "weights.safetensors")
    export_graphs(network, contract, package)
    write_contract(contract, package)
    images = (np.random.default_rng(3).random((4, *contract.shape)) * 2 - 1).astype(np.float32)
    with torch.inference_mode():
        logits = network(torch.from_numpy(images))[0].numpy()
    np.savez(package / "golden.npz", images=images, logits=logits)
    seen = [{"sha256": str(n), "subject": str(n), "site": SITE, "split": "validation", "probability": 0.5,
             "uncertainty": 0.5, **describe(image)} for n, image in enumerate(images)]  # fmt: skip
    write_reference(seen, name_columns(contract), package / "reference.parquet")
    digest = digest_package(package)
    predictions = [{"sha256": f"{n}", "subject": f"{n}", "site": SITE, "split": "test", "truth": n % 2,
                    "probability": 0.25 + n % 2 / 2} for n in range(40)]  # fmt: skip
    told: dict[str, dict[str, Any]] = {
        "fit/history": {"epochs": []},
        "evaluate/evaluation": {"package": digest, "engine": "openvino/f32", "threshold": 0.5, "overall": {},
                                "sets": {"test": {"digest": "sha256:test", "subjects": 40, "images": 40}},
                                "sites": {}, "model_bytes": 1, "predictions": predictions},
        "qualify/qualification": {"package": digest,
                                  "engines": dict.fromkeys(TOLERANCE, QUALIFIED)},
        "reference/alarms": {"package": digest},
    }  # fmt: skip
    for name, body in told.items():
        path = places.build / task / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(body))


def make_contract(task: str, section: dict[str, Any]) -> Contract:
    check, package, side = section["check"], section["package"], SIDES[task]
    return Contract.model_validate({
        "task": task, "title": task, "kind": section["kind"], "modality": section["modality"],
        "classes": section["classes"], "positive": section["classes"][1:],
        "channels": 3 if task == DENSE else 1, "depth": 0, "rows": side, "columns": side,
        "spacing_low_mm": check["spacing_low_mm"],
        "spacing_high_mm": check["spacing_high_mm"], "png_offset": package.get("png_offset", 0.0),
        "max_batch": package["max_batch"], "preparation": section["preparation"], "temperature": 1.0,
        "threshold": 0.5, "tolerance": package["tolerance"], "intended_use": "To be measured.",
        "simulated": "Its weights are drawn.", "limits": (), "lineage": {},
    })  # fmt: skip
