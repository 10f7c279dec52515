"""What runs a package: OpenVINO, ONNX Runtime or torch, behind one protocol.

An engine is chosen by configuration and never replaced silently: what cannot be opened is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from imaging.detection import STRIDE
from imaging.errors import ConfigError, TrustError
from imaging.vocabulary import Kind
from registry.package import PROGRAM, Contract, read_golden

OUTPUTS = ("logits", "heat", "embedding")


@dataclass(frozen=True)
class Answers:
    """What a network says of a batch of n images.

    Attributes:
        logits: float32 (n, classes) or (n, classes[, depth], rows, columns); see `Contract.probabilities`.
        heat: float32 (n[, depth], rows, columns): where it looked, or where it is unsure.
        embedding: float32 (n, features).
    """

    logits: NDArray[np.float32]
    heat: NDArray[np.float32]
    embedding: NDArray[np.float32]


class Engine(Protocol):
    """Runs one package on one device."""

    name: str

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch, float32 (n, channels[, depth], rows, columns), n at least 1."""
        ...


class OpenVino:
    """model.onnx on a CPU, with the precision said out loud."""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        self.name = f"openvino/{precision}"
        self._request = (
            openvino.Core().compile_model(folder / "model.onnx", "CPU", settings).create_infer_request()
        )

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch."""
        self._request.infer({"image": batch})
        return Answers(*(np.array(self._request.get_tensor(name).data) for name in OUTPUTS))


class OnnxRuntime:
    """model.onnx on a CPU, f32."""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        import onnxruntime

        _only_f32("onnxruntime", precision)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        self.name = "onnxruntime/f32"
        self._session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch."""
        return Answers(*self._session.run(list(OUTPUTS), {"image": batch}))


class Torch:
    """program.pt2, f32: the reference. The file can hide code, so verify the package's signature first."""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        import torch

        _only_f32("torch", precision)
        torch.set_num_threads(threads)
        self.name = "torch/f32"
        self._torch = torch
        self._network: Any = torch.export.load(folder / "program.pt2").module()

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch."""
        with self._torch.inference_mode():
            return Answers(*(out.numpy() for out in self._network(self._torch.from_numpy(batch))))


ENGINES: dict[str, Callable[[Path, str, int], Engine]] = {
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "torch": Torch,
}


def open_engine(folder: Path, engine: str, precision: str, threads: int = 1) -> Engine:
    """Open a package's model.

    Args:
        folder: the package.
        engine: openvino, onnxruntime or torch.
        precision: f32, or bf16 where the engine has it.
        threads: of one call.

    Raises:
        ConfigError: no such engine or precision.
        TrustError: the file cannot be compiled.
    """
    if engine not in ENGINES or precision not in ("f32", "bf16"):
        raise ConfigError(
            f"No engine {engine}/{precision}.", f"Engines: {', '.join(ENGINES)}; precisions: f32, bf16."
        )
    if engine == "torch" and not (folder / PROGRAM).exists():
        raise TrustError("This version came as ONNX and has no program for torch.", "Take another engine.")
    try:
        return ENGINES[engine](folder, precision, threads)
    except Exception as error:  # onnxruntime's own errors have no class in common
        raise TrustError(
            f"{engine} cannot open the package {folder.name[:12]} ({type(error).__name__}).",
            "Build it again.",
        ) from error


def check_answers(answers: Answers, contract: Contract, count: int) -> None:
    """Hold an engine's answers to the contract: ONNX itself checks nothing.

    Raises:
        TrustError: other shapes than promised, or numbers that are not finite.
    """
    shape: tuple[int, ...] = (count, len(contract.classes))
    if contract.kind is Kind.SEGMENTATION:
        shape = (*shape, *contract.spatial)
    elif contract.kind is Kind.DETECTION:
        shape = (count, 3, contract.rows // STRIDE, contract.columns // STRIDE)
    if answers.logits.shape != shape or answers.heat.shape != (count, *contract.spatial):
        raise TrustError(
            f"The engine answered with shape {answers.logits.shape}.", "Qualify the version again."
        )
    if not (np.isfinite(answers.logits).all() and np.isfinite(answers.heat).all()):
        raise TrustError("The engine answered NaN or infinity.", "Qualify the version again.")


def measure_parity(engine: Engine, folder: Path, contract: Contract, batch: int = 8) -> float:
    """Largest difference of a probability from the reference engine, over the golden cases.

    Raises:
        TrustError: other shapes than promised, or numbers that are not finite.
    """
    golden = read_golden(folder)
    worst = 0.0
    for start in range(0, len(golden.images), batch):
        images = golden.images[start : start + batch]
        answers = engine.run(images)
        check_answers(answers, contract, len(images))
        expected = contract.probabilities(golden.logits[start : start + batch])
        worst = max(worst, float(np.abs(contract.probabilities(answers.logits) - expected).max()))
    return worst


def check_parity(engine: Engine, folder: Path, contract: Contract) -> float:
    """Refuse an engine that does not answer the golden cases as the contract promises.

    Returns:
        The largest difference of a probability.

    Raises:
        TrustError: above the contract's tolerance, or no tolerance is promised for this engine.
    """
    if engine.name not in contract.tolerance:
        raise TrustError(
            f"The contract of {contract.task} promises nothing for {engine.name}.",
            f"Use one of {', '.join(contract.tolerance)}, or add a tolerance in params.yaml.",
        )
    difference, allowed = measure_parity(engine, folder, contract), contract.tolerance[engine.name]
    if difference > allowed:
        raise TrustError(
            f"{engine.name} differs from the golden answers by {difference:.2g}, more than {allowed:g}.",
            "Use another engine or precision on this host.",
        )
    return difference


def _only_f32(engine: str, precision: str) -> None:
    if precision != "f32":
        raise ConfigError(f"{engine} runs f32 here, not {precision}.", "Choose openvino/bf16 or f32.")
