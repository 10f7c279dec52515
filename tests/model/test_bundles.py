"""A package leaves as a MONAI bundle: MONAI itself verifies it, runs it and gives the contract's answers."""

import csv
import json
import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch

from imaging.errors import DataError, TrustError
from imaging.manifest import read_manifest
from imaging.preparation import Colour, Percentiles, Window, prepare
from imaging.recipe import Architecture
from imaging.vocabulary import Kind
from registry.architectures import build
from registry.bundles import _prepare, _write_script, export_bundle
from registry.engines import open_engine
from registry.graphs import export_graphs
from registry.package import digest_package, read_contract, read_golden, write_contract
from tests.tiny import promise

# What MONAI's schema of July 2024 asks for. verify_metadata downloads it, unless the file is there.
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
TENSORS = {"type": "object", "additionalProperties": TENSOR}
TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description",
         "authors", "copyright", "data_source", "data_type", "intended_use")  # fmt: skip
OBJECTS = {"required_packages_version": {"type": "object"}, "changelog": {"type": "object"}}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "required": [*TEXTS[:9], "required_packages_version", "network_data_format"],
    "properties": {
        **{name: {"type": "string"} for name in TEXTS}, **OBJECTS,
        "network_data_format": {"type": "object", "required": ["inputs", "outputs"],
                                "properties": {"inputs": TENSORS, "outputs": TENSORS}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(built, tmp_path_factory):
    places, _, _ = built
    package = places.stage("tiny", "package")
    return package, export_bundle(package, tmp_path_factory.mktemp("out") / "bundle")


def test_a_bundle_has_what_the_specification_asks_for_and_none_of_our_code(bundle):
    package, folder = bundle
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["LICENSE", "configs/inference.json", "configs/metadata.json", "docs/README.md",
                     "models/model.onnx", "models/model.ts"]  # fmt: skip
    targets = [word for word in (folder / "configs" / "inference.json").read_text().split('"') if "." in word]
    assert not [word for word in targets if word.startswith(("registry", "imaging", "training"))]
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert metadata["formulary"] == read_contract(package).model_dump(mode="json")
    assert digest_package(package) in (folder / "docs" / "README.md").read_text()


def test_monai_verifies_metadata_and_network(bundle, tmp_path, monkeypatch):
    from monai.bundle import verify_metadata, verify_net_in_out

    _, folder = bundle
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    told = {"meta_file": str(folder / "configs" / "metadata.json")}
    verify_metadata(**told, filepath=str(tmp_path / "schema.json"))
    monkeypatch.chdir(folder)
    verify_net_in_out("network_def", **told, config_file="configs/inference.json", device="cpu")
    bare = json.loads((folder / "configs" / "metadata.json").read_text())
    del bare["network_data_format"]["inputs"]["image"]["dtype"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="'dtype' is a required property"):
        verify_metadata(meta_file=str(tmp_path / "bare.json"), filepath=str(tmp_path / "schema.json"))


def test_monai_runs_it_and_gives_the_answers_of_the_contract(bundle, built, tmp_path):
    (package, folder), places = bundle, built[0]
    contract, golden = read_contract(package), read_golden(package)
    low, high = contract.preparation.low_hu, contract.preparation.high_hu
    cases = {f"golden{i}": (image[0] + 1) / 2 * (high - low) + low for i, image in enumerate(golden.images)}
    expected = dict(zip(cases, contract.probabilities(golden.logits), strict=True))
    row = read_manifest(places.stage("tiny", "split") / "manifest.parquet").iloc[0]["row"]
    stored = np.load(places.stage("tiny", "cohort") / "images.npy")[row]
    prepared = prepare(stored.astype(np.float32), contract.preparation)
    said = open_engine(package, "openvino", "f32").run(prepared[None]).logits
    cases["stored"], expected["stored"] = stored, contract.probabilities(said)[0]
    for name, pixels in cases.items():
        np.save(tmp_path / f"{name}.npy", pixels)
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json",
               "--dataset_dir", str(tmp_path)]  # fmt: skip
    env = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = read_answers(folder / "eval", contract.kind)
    assert set(answers) == set(expected)
    for name, probabilities in expected.items():
        np.testing.assert_allclose(
            answers[name], probabilities, atol=contract.tolerance["torch/f32"], err_msg=name
        )


def read_answers(folder, kind):
    if kind is Kind.CLASSIFICATION:
        rows = csv.reader((folder / "predictions.csv").read_text().splitlines())
        return {
            row[0].rpartition("/")[2].removesuffix(".npy"): np.array(row[1:], float) for row in rows if row
        }
    found = {path.name.removesuffix("_probabilities.nii.gz"): path for path in folder.glob("*.nii.gz")}
    images = {name: np.asarray(nibabel.load(path).dataobj) for name, path in found.items()}
    return {name: np.moveaxis(image[:, :, 0], -1, 0) for name, image in images.items()}


@pytest.mark.parametrize(("how", "shape"), [
    (Window(low_hu=-1000, high_hu=200), (9, 7)), (Percentiles(low=2, high=98), (9, 7)),
    (Percentiles(low=2, high=98), (5, 9, 7)), (Colour(), (9, 7, 3)),
], ids=["window", "percentiles", "volume", "colour"])  # fmt: skip
def test_monais_transforms_prepare_an_image_as_the_house_does(how, shape, tmp_path):
    from monai.bundle import ConfigParser

    pixels = np.random.default_rng(1).normal(100, 80, shape).astype(np.float32)
    np.save(tmp_path / "image.npy", pixels)
    contract = promise(
        "classification",
        preparation=how.model_dump(),
        channels=3 if len(shape) == 3 and shape[-1] == 3 else 1,
    )
    steps = ConfigParser({"all": {"_target_": "Compose", "transforms": _prepare(contract)}})
    made = steps.get_parsed_content("all")({"image": str(tmp_path / "image.npy")})["image"]
    np.testing.assert_allclose(np.asarray(made), prepare(pixels, how), atol=2e-5)


def test_a_script_answers_any_number_of_images_also_where_the_network_asks_for_their_number(tmp_path):
    torch.manual_seed(0)
    contract = promise("classification", classes=("none", "disc"), temperature=2.0)
    network = build(Architecture(name="vit", channels=(8, 16)), contract.shape, 2).eval()
    export_graphs(network, contract, tmp_path)
    write_contract(contract, tmp_path)
    images = np.random.default_rng(0).normal(size=(3, *contract.shape)).astype(np.float32)
    with torch.no_grad():
        logits = network(torch.from_numpy(images))[0].numpy()
    np.savez(tmp_path / "golden.npz", images=images, logits=logits)
    _write_script(tmp_path, contract, tmp_path / "model.ts")
    script = torch.jit.load(tmp_path / "model.ts")
    for count in (1, 2, 3):
        with torch.no_grad():
            said = script(torch.from_numpy(images[:count])).numpy()
        np.testing.assert_allclose(said, logits[:count] / 2, atol=1e-5)
    np.savez(tmp_path / "golden.npz", images=images, logits=logits + 0.1)
    with pytest.raises(TrustError, match="differs from its golden answers"):
        _write_script(tmp_path, contract, tmp_path / "model.ts")


def test_nothing_is_overwritten(bundle):
    package, folder = bundle
    with pytest.raises(DataError, match="exists"):
        export_bundle(package, folder)
