"""Models from elsewhere: converted where they can do no harm, and answering as they did before."""

import json
import pickle
import shutil
import zipfile

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from imaging.config import read_params
from imaging.errors import ConfigError, DataError, TrustError
from imaging.vocabulary import Kind
from registry import conversion, imports, intake
from registry.architectures import build
from registry.bundles import export_bundle
from registry.engines import check_parity, open_engine
from registry.evidence import describe_provenance
from registry.graphs import read_graph
from registry.imports import import_model, read_import
from registry.package import digest_files, read_contract, read_golden
from tests.tiny import promise, run_stages, write_cohort, write_root
from training.evaluation import evaluate
from training.exporting import export

SHAPE = {"channels": 1, "rows": 32, "columns": 32}
TWO = promise("classification", classes=("none", "disc"))
UNET = {
    "_target_": "UNet",
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
}
FAITH = "A friend sent it."


@pytest.fixture
def places(tmp_path):
    """A checkout with a task that classifies and one that segments."""
    (tmp_path / "root").mkdir()
    return write_root(tmp_path / "root", tiny=Kind.CLASSIFICATION, parts=Kind.SEGMENTATION)


def terms(tmp_path, **told):
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump({**SHAPE, **told}))
    return path


def make_network(classes=2):
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 64, classes)]
    return nn.Sequential(*body).eval()


def write_onnx(network, path, **how):
    torch.onnx.export(network, torch.zeros(1, 1, 32, 32), path, dynamo=False, **how)
    return path


def draw(count=3):
    return np.random.default_rng(2).uniform(-1, 1, (count, 1, 32, 32)).astype(np.float32)


def write_bundle(folder, config, metadata=None, model=None):
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    image = {"num_channels": 1, "spatial_shape": [32, 32], "value_range": [0, 1], "dtype": "float32"}
    metadata = metadata or {"intended_use": "Theirs.", "network_data_format": {"inputs": {"image": image}}}
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    if model is not None:
        torch.save(model, folder / "models" / "model.pt")
    else:
        (folder / "models" / "model.pt").write_bytes(b"")
    return folder


# What comes in, and answers as it did


def test_an_onnx_file_becomes_a_version_that_goes_the_way_of_all(places, tmp_path):
    network = make_network()
    source = write_onnx(network, tmp_path / "theirs.onnx")
    write_cohort(places, "tiny", Kind.CLASSIFICATION)
    found = import_model(places, "tiny", source, terms(tmp_path), FAITH)
    assert import_model(places, "tiny", source, terms(tmp_path), FAITH) == found
    section, package = read_params(places).task("tiny"), places.stage("tiny", "package")
    package.mkdir(parents=True)
    (package / "program.pt2").write_bytes(b"of another model")
    digest = export(places, "tiny", section, found)
    assert "program.pt2" not in digest_files(package)
    contract, golden = read_contract(package), read_golden(package)
    with torch.no_grad():
        logits = network(torch.from_numpy(golden.images)).numpy()
    np.testing.assert_allclose(golden.logits, logits, atol=1e-5)
    for engine in ("openvino", "onnxruntime"):
        check_parity(open_engine(package, engine, "f32"), package, contract)
    assert set(contract.tolerance) == {"openvino/f32", "openvino/bf16", "onnxruntime/f32"}
    assert contract.temperature != 1  # frozen on this house's validation, since nobody told it
    assert contract.lineage["imported"].removeprefix("sha256:") == intake.digest_file(source)
    assert FAITH in contract.limits[0]
    body = evaluate(places, "tiny", section)
    assert body["package"] == digest
    assert body["overall"]["auc"]


def test_what_is_signed_of_an_import_says_so_and_tells_no_training(places, tmp_path):
    write_cohort(places, "tiny", Kind.CLASSIFICATION)
    found = import_model(
        places, "tiny", write_onnx(make_network(), tmp_path / "m.onnx"), terms(tmp_path), FAITH
    )
    export(places, "tiny", read_params(places).task("tiny"), found)
    told = describe_provenance(places, "tiny")
    lineage = read_contract(places.stage("tiny", "package")).lineage
    assert told["params"]["fit"] == {"imported": lineage["imported"]}
    assert told["history"] == {"epochs": []}
    assert told["lineage"] == lineage


def test_a_class_map_and_an_embedding_are_derived_from_logits_alone(places, tmp_path):
    network = make_network()
    made = import_model(places, "tiny", write_onnx(network, tmp_path / "m.onnx"), terms(tmp_path), FAITH)
    images = draw()
    with torch.no_grad():
        maps = network[:3](torch.from_numpy(images))
        weight = network[4].weight.reshape(2, 6, 8, 8)
        added = torch.relu((maps * (weight[1] - weight[0])).sum(1, keepdim=True))
        heat = nn.functional.interpolate(added, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    for engine in ("openvino", "onnxruntime"):
        answers = open_engine(made, engine, "f32").run(images)
        np.testing.assert_allclose(answers.heat, heat.numpy(), atol=1e-5)
        np.testing.assert_allclose(answers.embedding, maps.flatten(1).numpy(), atol=1e-5)
    deeper = nn.Sequential(*network[:4], nn.Linear(384, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    made = import_model(places, "tiny", write_onnx(deeper, tmp_path / "d.onnx"), terms(tmp_path), FAITH)
    assert any("whichever class" in limit for limit in read_import(made).contract["limits"])
    with torch.no_grad():
        size = nn.functional.interpolate(
            network[:3](torch.from_numpy(images)).abs().mean(1, keepdim=True), size=(32, 32), mode="bilinear"
        )[:, 0].numpy()
    np.testing.assert_allclose(open_engine(made, "onnxruntime", "f32").run(images).heat, size, atol=1e-5)


@pytest.mark.parametrize("end", [[], [nn.Sigmoid()]], ids=["logit", "sigmoid"])
def test_one_logit_is_that_of_the_second_class(places, tmp_path, end):
    network = make_network(1)
    source = write_onnx(nn.Sequential(network, *end), tmp_path / "m.onnx", opset_version=13)
    answers = open_engine(
        import_model(places, "tiny", source, terms(tmp_path), FAITH), "onnxruntime", "f32"
    ).run(draw())
    with torch.no_grad():
        expected = torch.sigmoid(network(torch.from_numpy(draw()))).numpy()[:, 0]
    np.testing.assert_allclose(TWO.probabilities(answers.logits)[:, 1], expected, atol=1e-6)


def test_a_state_dict_of_the_tasks_own_architecture_keeps_its_program(places, tmp_path):
    section = read_params(places).task("tiny")
    torch.manual_seed(0)
    network = build(section.fit.architecture, (1, 32, 32), 2, (1,)).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pt")
    made = import_model(places, "tiny", tmp_path / "weights.pt", terms(tmp_path), FAITH)
    with torch.no_grad():
        expected = [one.numpy() for one in network(torch.from_numpy(draw()))]
    for engine in ("torch", "onnxruntime"):
        answers = open_engine(made, engine, "f32").run(draw())
        for said, wanted in zip((answers.logits, answers.heat, answers.embedding), expected, strict=True):
            np.testing.assert_allclose(said, wanted, atol=1e-5)


def test_a_state_dict_of_another_network_is_refused_by_the_names_that_differ(places, tmp_path):
    section = read_params(places).task("tiny")
    network = build(section.fit.architecture, (1, 32, 32), 2, (1,))
    weights = {name: value for name, value in network.state_dict().items() if "head" not in name}
    save_file({**weights, "extra": torch.zeros(1)}, tmp_path / "fewer.safetensors")
    asked = {"source": tmp_path / "fewer.safetensors", "contract": TWO}
    with pytest.raises(
        ConfigError, match=r"not of this cnn: .*Missing key.*head\.weight.*Unexpected key.*extra"
    ):
        conversion._load(imports.Conversion(**asked, architecture=section.fit.architecture), tmp_path)
    with pytest.raises(ConfigError, match="not said of which network"):
        conversion._load(imports.Conversion(**asked), tmp_path)


def test_a_monai_bundle_is_imported_from_its_weights_and_reads_the_range_that_its_metadata_tell(
    places, tmp_path
):
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    network = UNet(2, 1, 3, (4, 8), (2,)).eval()
    config = {"imports": ["$import os"], "network_def": UNET, "run": ["$os.system('true')"]}
    folder = write_bundle(tmp_path / "theirs", config, model=network.state_dict())
    shutil.make_archive(str(tmp_path / "theirs"), "zip", tmp_path, "theirs")
    with pytest.raises(TrustError, match=r"inference\.json\.run\.0 is an expression"):
        import_model(places, "parts", folder, None, FAITH)
    made = import_model(
        places, "parts", tmp_path / "theirs.zip", terms(tmp_path, network="network_def"), FAITH
    )
    answers = open_engine(made, "openvino", "f32").run(draw())
    with torch.no_grad():
        expected = network(torch.from_numpy((draw() + 1) / 2))
    np.testing.assert_allclose(answers.logits, expected.numpy(), atol=1e-4)
    unsure = 1 - torch.softmax(expected, 1).amax(1)
    np.testing.assert_allclose(answers.heat, unsure.numpy(), atol=1e-5)
    assert read_import(made).contract["intended_use"] == "Theirs."


def test_a_package_that_left_as_a_bundle_comes_back_with_the_same_answers(places, tmp_path):
    write_cohort(places, "tiny", Kind.CLASSIFICATION)
    section, package = read_params(places).task("tiny"), places.stage("tiny", "package")
    run_stages(places, section)
    contract, golden, model = (
        read_contract(package),
        read_golden(package),
        (package / "model.onnx").read_bytes(),
    )
    bundle = export_bundle(package, tmp_path / "bundle")
    export(places, "tiny", section, import_model(places, "tiny", bundle, None, FAITH))
    again = read_contract(package)
    assert (package / "model.onnx").read_bytes() == model
    assert (again.temperature, again.threshold) == (contract.temperature, contract.threshold)
    np.testing.assert_array_equal(read_golden(package).images, golden.images)
    np.testing.assert_allclose(read_golden(package).logits, golden.logits, atol=1e-5)
    with pytest.raises(TrustError, match="came as ONNX"):
        export_bundle(package, tmp_path / "twice")


# What is refused


def test_a_contract_that_lacks_something_or_is_not_the_tasks_is_refused(places, tmp_path):
    source = write_onnx(make_network(), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="lacks channels, columns, rows"):
        import_model(places, "tiny", source, None, FAITH)
    with pytest.raises(ConfigError, match="lacks threshold"):
        import_model(places, "tiny", source, terms(tmp_path, temperature=1.5), FAITH)
    with pytest.raises(ConfigError, match="The contract says classes"):
        import_model(
            places, "tiny", source, terms(tmp_path, classes=["none", "cyst"], positive=["cyst"]), FAITH
        )
    with pytest.raises(ConfigError, match="unknown key 'treshold', did you mean 'threshold'"):
        import_model(places, "tiny", source, terms(tmp_path, treshold=0.5), FAITH)
    unsaid = {
        "network_data_format": {
            "inputs": {"image": {"num_channels": 1, "spatial_shape": [32, 32], "value_range": []}}
        }
    }
    folder = write_bundle(tmp_path / "unsaid", {"network_def": UNET}, unsaid)
    with pytest.raises(ConfigError, match="lacks value_range"):
        import_model(places, "parts", folder, None, FAITH)


OPENED = "$open('CANARY', 'w') and 1"
HOSTILE = {
    "an expression": ({"network_def": {**UNET, "in_channels": OPENED}}, "in_channels is an expression"),
    "elsewhere": ({"network_def": UNET, "initialize": [OPENED]}, r"initialize\.0 is an expression"),
    "an import": ({"imports": ["$import scripts"], "network_def": UNET}, r"imports\.0 is an expression"),
    "os.system": ({"network_def": {"_target_": "os.system", "command": "touch CANARY"}}, "_target_ is 'os"),
    "beside it": ({"network_def": UNET, "x": [{"_target_": "builtins.open"}]}, r"x\.0\._target_ is 'built"),
    "a script": ({"network_def": {"_target_": "scripts.net.UNet"}}, r"_target_ is 'scripts\.net\.UNet'"),
    "no network": ({"network_def": {"_target_": "monai.networks.nets.Transchex"}}, "_target_ is"),
    "within": ({"network_def": {**UNET, "act": {"_target_": "UNet"}}}, r"network_def\.act would make"),
    "fetched": ({"network_def": {**UNET, "pretrained": True}}, r"network_def\.pretrained would"),
    "requires": ({"network_def": {**UNET, "_requires_": ["x"]}}, r"network_def\._requires_ steers"),
    "mode": ({"network_def": {**UNET, "_mode_": "callable"}}, r"network_def\._mode_ steers"),
    "a reference": ({"network_def": "@other", "other": UNET}, "network_def is a reference"),
    "a macro": ({"network_def": "%/etc/passwd"}, "network_def is a macro"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bundle_that_would_run_or_fetch_something_is_refused_by_its_key(places, tmp_path, case):
    config, why = HOSTILE[case]
    folder = write_bundle(
        tmp_path / "bundle", json.loads(json.dumps(config).replace("CANARY", str(tmp_path / "canary")))
    )
    with pytest.raises(TrustError, match=why):
        import_model(places, "parts", folder, None, FAITH)
    assert not (tmp_path / "canary").exists()


def test_a_configuration_that_unfolds_without_end_is_refused(places, tmp_path):
    folder = write_bundle(tmp_path / "bundle", {})
    (folder / "configs" / "inference.json").rename(folder / "configs" / "inference.yaml")
    (folder / "configs" / "inference.yaml").write_text(
        "a: &a [1, 1]\nb: &b [*a, *a]\nnetwork_def: [*b, *b]\n"
    )
    with pytest.raises(TrustError, match="has an alias"):
        import_model(places, "parts", folder, None, FAITH)
    (folder / "configs" / "inference.yaml").unlink()
    for text, why in (("[" * 100_000, "RecursionError"), ("{", "JSONDecodeError"), ("[]", "has no keys")):
        (folder / "configs" / "inference.json").write_text(text)
        with pytest.raises(DataError, match=why):
            import_model(places, "parts", folder, None, FAITH)
    (folder / "configs" / "inference.json").write_text(
        json.dumps({"network_def": UNET, "x": [0] * intake.MOST_VALUES})
    )
    with pytest.raises(DataError, match="more than 20000 values"):
        import_model(places, "parts", folder, None, FAITH)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_with_code_is_not_run(places, tmp_path):
    canary = tmp_path / "canary"
    folder = write_bundle(tmp_path / "bundle", {"network_def": UNET}, model={"w": Bomb(str(canary))})
    with pytest.raises(ConfigError, match="UnpicklingError"):
        import_model(places, "parts", folder, None, FAITH)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(str(canary))))  # so it would have been
    assert canary.exists()


def test_a_network_that_asks_for_too_much_memory_or_time_is_stopped(places, tmp_path, monkeypatch):
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    huge = terms(tmp_path, architecture={"name": "cnn", "channels": [2_000_000, 2_000_000]})
    with pytest.raises(TrustError, match=r"cannot be converted: RuntimeError: .*can't allocate memory"):
        import_model(places, "tiny", tmp_path / "w.safetensors", huge, FAITH)
    monkeypatch.setattr(imports, "SECONDS", 0.2)
    with pytest.raises(TrustError, match=r"took longer than 0\.2 s"):
        import_model(places, "tiny", write_onnx(make_network(), tmp_path / "m.onnx"), terms(tmp_path), FAITH)
    assert list((places.var / "imports").iterdir()) == []


@pytest.mark.skipif(not shutil.which("unshare"), reason="this host cannot take the network away")
def test_the_converter_has_no_network():
    import subprocess
    import sys

    code = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    done = subprocess.run(
        [*imports._isolate(), sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "unreachable" in done.stderr.lower()


def write_zip(path, *members, size=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members:
            archive.writestr(member, data)
        if size is not None:
            archive.infolist()[-1].file_size = size
    return path


def link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o120777 << 16
    return member


def test_a_zip_that_leaves_its_folder_links_or_unfolds_is_refused(places, tmp_path):
    zeros = bytes(4 * 2**20)
    for number, (members, size, error, why) in enumerate([
        ([("b/../../../evil", "x")], None, TrustError, "leaves the bundle"),
        ([("/tmp/evil", "x")], None, TrustError, "leaves the bundle"),
        ([("b\\..\\..\\evil", "x")], None, TrustError, "leaves the bundle"),
        ([(link("b/models/model.pt"), "/etc/passwd")], None, TrustError, "is a link"),
        ([("b/models/model.pt", zeros)], 3 * 2**30, DataError, "files of 3072 MiB"),
        ([("b/models/model.pt", zeros)], 10, DataError, "cannot be unpacked"),
        ([(f"b/{number}", "") for number in range(1001)], None, DataError, "1001 files"),
        ([("b/readme", "x")], None, DataError, "no configs/metadata.json"),
    ]):  # fmt: skip
        source = write_zip(tmp_path / f"{number}.zip", *members, size=size)
        with pytest.raises(error, match=why):
            import_model(places, "parts", source, None, FAITH)
    (tmp_path / "no.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="BadZipFile"):
        import_model(places, "parts", tmp_path / "no.zip", None, FAITH)
    assert not list(tmp_path.rglob("evil"))


def test_a_folder_with_a_link_is_refused(places, tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"network_def": UNET})
    (folder / "models" / "model.pt").unlink()
    (folder / "models" / "model.pt").symlink_to("/etc/passwd")
    with pytest.raises(TrustError, match=r"model\.pt is a link"):
        import_model(places, "parts", folder, None, FAITH)


def change_domain(model):
    model.graph.node[0].domain = "com.evil"
    model.opset_import.append(helper.make_opsetid("com.evil", 1))


def hide_in_a_branch(model):
    inner = helper.make_graph([helper.make_node("Run", [], ["y"], domain="com.evil")], "g", [],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])  # fmt: skip
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    model.graph.node.append(helper.make_node("If", ["yes"], ["never"], then_branch=inner, else_branch=inner))


def move_outside(location):
    def change(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def widen(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64


def add_input(model):
    model.graph.input.append(helper.make_tensor_value_info("age", TensorProto.FLOAT, [1]))


CHANGES = {
    "domain": (change_domain, "domain 'com.evil'"), "branch": (hide_in_a_branch, "Run is of the domain"),
    "upwards": (move_outside("../secret"), "no file of its own folder"),
    "absolute": (move_outside("/etc/passwd"), "no file of its own folder"),
    "link": (move_outside("link"), "no file of its own folder"),
    "shape": (widen, "takes 1 x 1 x 64 x 32, and the contract promises images of 1 x 32 x 32"),
    "inputs": (add_input, "has 2 inputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_graph_with_other_operators_data_elsewhere_or_another_input_is_refused(tmp_path, case):
    change, why = CHANGES[case]
    (tmp_path / "secret").write_bytes(bytes(10_000))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "link").symlink_to(tmp_path / "secret")
    source = write_onnx(make_network(), tmp_path / "inner" / "m.onnx")
    model = onnx.load(source)
    change(model)
    source.write_bytes(model.SerializeToString())
    with pytest.raises(TrustError, match=why):
        read_graph(source, TWO)


def test_data_beside_the_file_are_taken_in(places, tmp_path):
    source = write_onnx(make_network(), tmp_path / "whole.onnx")
    onnx.save(
        onnx.load(source),
        tmp_path / "split.onnx",
        save_as_external_data=True,
        location="beside.bin",
        size_threshold=0,
    )
    made = [
        import_model(places, "tiny", path, terms(tmp_path), FAITH)
        for path in (source, tmp_path / "split.onnx")
    ]
    said = [open_engine(path, "onnxruntime", "f32").run(draw()).logits for path in made]
    np.testing.assert_array_equal(*said)


class Mixing(nn.Module):
    def forward(self, logits):
        return logits - logits.mean(0, keepdim=True)


def test_what_is_no_model_does_not_answer_or_would_need_a_terabyte_is_refused(places, tmp_path):
    def refuse(name, data, error, why):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(error, match=why):
            import_model(places, "tiny", tmp_path / name, terms(tmp_path), FAITH)

    refuse("m.onnx", b"no model", DataError, "is no ONNX file")
    refuse("m.h5", b"", DataError, "no model that can be imported")
    nodes = [helper.make_node("ConstantOfShape", ["sizes"], ["huge"]),
             helper.make_node("ReduceSum", ["huge"], ["sum"]),
             helper.make_node("Add", ["x", "sum"], ["logits"])]  # fmt: skip
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 32, 32])
    answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [2], [2**20, 2**20])
    graph = helper.make_graph(nodes, "g", [value], [answer], [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    refuse("huge.onnx", model.SerializeToString(), TrustError, "cannot|No map|stopped")
    source = write_onnx(nn.Sequential(make_network(), Mixing()), tmp_path / "mixing.onnx")
    with pytest.raises(TrustError, match="depends on the images beside it"):
        import_model(places, "tiny", source, terms(tmp_path), FAITH)
    with pytest.raises(TrustError, match=r"answered with shape \(2, 5\)"):
        import_model(
            places, "tiny", write_onnx(make_network(5), tmp_path / "five.onnx"), terms(tmp_path), FAITH
        )


def test_an_import_that_was_changed_is_not_taken(places, tmp_path):
    made = import_model(
        places, "tiny", write_onnx(make_network(), tmp_path / "m.onnx"), terms(tmp_path), FAITH
    )
    with (made / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(TrustError, match="was changed"):
        read_import(made)
