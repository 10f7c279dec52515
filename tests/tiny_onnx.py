"""A package that engines open, made without a network's code: one convolution, its mean, two classes."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from imaging.vocabulary import Kind
from registry.engines import open_engine
from registry.package import write_contract
from tests.tiny import promise

KERNEL = np.array([[[[0, 1, 0], [1, 2, 1], [0, 1, 0]]]], np.float32)
TOLERANCE = {"openvino/f32": 1e-3, "openvino/bf16": 0.1, "onnxruntime/f32": 1e-3}


def write_package(folder, **promised):
    """contract.json, model.onnx and golden.npz; its contract. A brighter image is more positive."""
    contract = promise(
        Kind.CLASSIFICATION, ("none", "disc"), **{"tolerance": TOLERANCE, "task": "tiny", **promised}
    )
    folder.mkdir(parents=True, exist_ok=True)
    constants = {"kernel": KERNEL, "axis": np.array([1]), "weight": np.array([[-0.6, 0.7]], np.float32),
                 "bias": np.array([-0.2, 0.1], np.float32)}  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["planes"], pads=[1, 1, 1, 1]),
        helper.make_node("Squeeze", ["planes", "axis"], ["heat"]),
        helper.make_node("GlobalAveragePool", ["planes"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["embedding"]),
        helper.make_node("Gemm", ["embedding", "weight", "bias"], ["logits"]),
    ]
    shapes = {"logits": ["n", 2], "heat": ["n", 32, 32], "embedding": ["n", 1]}
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 32, 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8),
        folder / "model.onnx",
    )
    write_contract(contract, folder)
    images = draw(8)
    logits = open_engine(folder, "onnxruntime", "f32").run(images).logits
    np.savez(folder / "golden.npz", images=images, logits=logits)
    return contract


def draw(count, seed=3):
    """Prepared images, each of another brightness."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(-0.8, 0.8, (count, 1, 1, 1))
    return (level + rng.normal(0, 0.1, (count, 1, 32, 32))).clip(-1, 1).astype(np.float32)
