"""What serves is what was asked for, else the fastest that passed on this host, else the default."""

import pytest

from imaging.errors import TrustError
from imaging.vocabulary import Kind
from registry.qualified import choose_engine, host_file, read_host, write_host
from tests.tiny import promise

DIGEST = "sha256:" + "7" * 64
PASSED = {"package": DIGEST, "engines": {
    "openvino/f32": {"passed": True}, "openvino/bf16": {"passed": True}, "torch-cuda/f16": {"passed": True},
    "torch/f32": {"passed": False, "reason": "a probability differs by 0.2"},
}}  # fmt: skip
CONTRACT = promise(
    Kind.CLASSIFICATION, tolerance=dict.fromkeys(("openvino/f32", "openvino/bf16", "torch-cuda/f16"), 0.1)
)


def keep(var, best, digest=DIGEST):
    write_host(var, {"package": digest, "best": best, "ms_per_batch": {}})


def test_a_host_that_did_not_look_serves_the_default(tmp_path):
    assert choose_engine(tmp_path, CONTRACT, PASSED) == "openvino/f32"
    assert choose_engine(tmp_path, CONTRACT, PASSED, kind="cuda") == "torch-cuda/f16"
    assert choose_engine(tmp_path, CONTRACT, {}) == "openvino/f32"


def test_the_fastest_engine_of_this_package_serves(tmp_path):
    keep(tmp_path, "openvino/bf16")
    keep(tmp_path, "openvino/f32", "sha256:" + "8" * 64)  # another version does not forget the first
    assert choose_engine(tmp_path, CONTRACT, PASSED) == "openvino/bf16"
    assert choose_engine(tmp_path, CONTRACT, {**PASSED, "package": "sha256:" + "9" * 64}) == "openvino/f32"
    assert [path.name for path in host_file(tmp_path, DIGEST).parent.glob("*.draft")] == []
    assert read_host(tmp_path, DIGEST)["best"] == "openvino/bf16"


@pytest.mark.parametrize("best", ["torch/f32", "onnxruntime/f32", "torch-cuda/f16"])
def test_a_forged_cache_cannot_choose_what_did_not_pass_or_runs_elsewhere(tmp_path, best):
    keep(tmp_path, best)
    assert choose_engine(tmp_path, CONTRACT, PASSED) == "openvino/f32"


def test_what_passed_but_is_not_promised_is_not_chosen(tmp_path):
    keep(tmp_path, "openvino/bf16")
    silent = CONTRACT.model_copy(update={"tolerance": {"openvino/f32": 0.1}})
    assert choose_engine(tmp_path, silent, PASSED) == "openvino/f32"


def test_what_is_asked_for_serves_unless_it_failed(tmp_path):
    keep(tmp_path, "openvino/bf16")
    assert choose_engine(tmp_path, CONTRACT, PASSED, "openvino/f32") == "openvino/f32"
    with pytest.raises(TrustError, match=r"torch/f32 failed the qualification of t: .* by 0\.2\."):
        choose_engine(tmp_path, CONTRACT, PASSED, "torch/f32")


def test_a_default_that_failed_gives_way_to_what_passed_and_is_promised_for_the_device(tmp_path):
    engines = {"openvino/f32": {"passed": False, "reason": "a probability differs by 0.3"},
               "onnxruntime/f32": {"passed": True}, "torch-cuda/f16": {"passed": True},
               "openvino/bf16": {"passed": True}}  # fmt: skip
    told = {"package": DIGEST, "engines": engines}
    assert choose_engine(tmp_path, CONTRACT, told) == "openvino/bf16"
    keep(tmp_path, "openvino/f32")
    assert choose_engine(tmp_path, CONTRACT, told) == "openvino/bf16"
    silent = CONTRACT.model_copy(update={"tolerance": {"openvino/f32": 0.1, "torch-cuda/f16": 0.1}})
    with pytest.raises(TrustError, match=r"openvino/f32 failed .* 0\.3\. No engine for cpu passed"):
        choose_engine(tmp_path, silent, told)
