"""Engines answer alike, from several threads too, and never on another device than the one they name."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

from imaging.errors import ConfigError, DeviceMissing, TrustError
from registry.engines import ENGINES, check_parity, device_kind, open_engine
from tests.tiny_onnx import KERNEL, draw, write_package

HERE = ("openvino/f32", "openvino/bf16", "onnxruntime/f32")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return folder, write_package(folder)


@pytest.mark.parametrize("name", HERE)
def test_an_engine_answers_the_golden_images_and_what_the_graph_says(package, name):
    folder, contract = package
    engine = open_engine(folder, *name.split("/"))
    assert engine.name == name
    assert check_parity(engine, folder, contract) < contract.tolerance[name]
    answers = engine.run(np.ones((3, 1, 32, 32), np.float32))
    np.testing.assert_allclose(answers.heat[:, 5, 5], KERNEL.sum(), rtol=0.01)  # by hand: 1 x (2 + 4 x 1)
    assert [part.dtype for part in (answers.logits, answers.heat, answers.embedding)] == ["float32"] * 3


@pytest.mark.parametrize("name", HERE)
def test_threads_that_share_an_engine_get_their_own_answers(package, name):
    engine = open_engine(package[0], *name.split("/"), streams=2)
    batches = [draw(size, seed) for seed in range(12) for size in (1, 5)]
    alone = [engine.run(batch) for batch in batches]
    kept = [answers.logits.copy() for answers in alone]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(engine.run, batches * 5))
    for number, answers in enumerate(together):
        np.testing.assert_array_equal(answers.logits, kept[number % len(kept)])
        np.testing.assert_array_equal(answers.heat, alone[number % len(kept)].heat)


def test_an_image_that_does_not_lie_row_by_row_is_answered_as_its_copy(package):
    engine = open_engine(package[0], "openvino", "f32")
    turned = draw(4).transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(engine.run(turned).heat, engine.run(np.ascontiguousarray(turned)).heat)


@pytest.mark.parametrize("name", [n for n in ENGINES if device_kind(n) == "cuda" and "onnx" in n])
def test_a_provider_that_is_not_there_is_an_error(package, name):
    with pytest.raises(DeviceMissing, match="ExecutionProvider"):
        open_engine(package[0], name, "f32", device="cuda:0")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_falls_back_to_the_cpu_is_an_error(package, monkeypatch):
    """onnxruntime opens the model all the same, on the CPU, and says so in its log alone."""
    known = ["CUDAExecutionProvider", *onnxruntime.get_available_providers()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    with pytest.raises(DeviceMissing, match="CUDAExecutionProvider cannot start here, or leaves nodes"):
        open_engine(package[0], "onnxruntime-cuda", "f32")


@pytest.mark.parametrize(("name", "device", "why"), [
    ("openvino/int8", "cpu", "why not int8"),
    ("openvino/f16", "cpu", r"No engine openvino/f16\."),
    ("tensorflow/f32", "cpu", "No engine tensorflow/f32"),
    ("openvino/f32", "cuda:0", "openvino/f32 runs on cpu, not on cuda"),
    ("onnxruntime-cuda/f32", "cpu:0", "onnxruntime-cuda/f32 runs on cuda, not on cpu"),
])  # fmt: skip
def test_what_no_engine_has_is_refused_by_name(package, name, device, why):
    with pytest.raises(ConfigError, match=why):
        open_engine(package[0], *name.split("/"), device=device)


def test_a_damaged_model_and_a_missing_program_are_not_trusted(package, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    for name in ("openvino", "onnxruntime"):
        with pytest.raises(TrustError, match="cannot open the package"):
            open_engine(tmp_path, name, "f32")
    with pytest.raises(TrustError, match="no program for torch"):
        open_engine(package[0], "torch", "bf16")


def test_an_engine_whose_answers_the_contract_does_not_promise_is_refused(package):
    folder, contract = package
    engine = open_engine(folder, "openvino", "bf16")
    strict = contract.model_copy(update={"tolerance": {"openvino/bf16": 1e-9}})
    with pytest.raises(TrustError, match="differs from the golden answers"):
        check_parity(engine, folder, strict)
    with pytest.raises(TrustError, match="promises nothing for openvino/bf16"):
        check_parity(engine, folder, contract.model_copy(update={"tolerance": {"openvino/f32": 1e-3}}))
