"""Half precision in torch answers as the reference does, within what a contract may promise."""

import numpy as np
import pytest

from imaging.errors import DeviceMissing
from registry.engines import measure_parity, open_engine
from registry.package import read_contract, read_golden


def test_torch_in_half_precision_answers_alike_and_as_float32(built):
    package = built[0].stage("tiny", "package")
    contract, images = read_contract(package), read_golden(package).images
    engine = open_engine(package, "torch", "bf16")
    assert engine.name == "torch/bf16"
    assert 1e-7 < measure_parity(engine, package, contract, 3) < 0.1  # half, but the same network
    answers = engine.run(images)
    assert [part.dtype for part in (answers.logits, answers.heat, answers.embedding)] == [np.float32] * 3


@pytest.mark.parametrize("precision", ["f32", "bf16", "f16"])
def test_torch_on_a_gpu_that_is_not_there_is_an_error(built, precision):
    with pytest.raises(DeviceMissing, match=r"There is no cuda:99"):
        open_engine(built[0].stage("tiny", "package"), "torch-cuda", precision, device="cuda:99")
