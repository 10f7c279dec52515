"""What runs a package: OpenVINO, ONNX Runtime or torch, behind one protocol.

An engine's name says runtime, kind of device and precision, e.g. `openvino/bf16`, `torch-cuda/f16`. It is
chosen by configuration and never replaced silently: what cannot be opened, or has no device, is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from imaging.detection import STRIDE
from imaging.errors import ConfigError, DeviceMissing, FormularyError, TrustError
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
    """Runs one package on one device; several threads may call it at the same time."""

    name: str

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch, float32 (n, channels[, depth], rows, columns), n at least 1."""
        ...


class Placing(TypedDict, total=False):
    """Where an engine runs: so many `streams` at the same time, on `device`, cpu:N or cuda:N."""

    streams: int
    device: str


class Order(NamedTuple):
    """What is opened: `number` is the device's, `threads` are of one call, `streams` calls run at once."""

    folder: Path
    engine: str
    precision: str
    threads: int
    streams: int
    number: int


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which would tell Google of every start, from a fork of this process."""
    sys.modules.setdefault("openvino_telemetry", cast("Any", None))  # as if it were not installed
    import openvino

    return openvino


class OpenVino:
    """model.onnx on a CPU, with the precision said out loud; every stream has its own request."""

    def __init__(self, order: Order) -> None:
        openvino = import_openvino()
        core = openvino.Core()
        told = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if order.precision == "bf16" and "BF16" not in told:
            raise DeviceMissing("This CPU has no bf16.", "Choose openvino/f32 on this host.")
        settings = {
            "INFERENCE_PRECISION_HINT": order.precision,
            "INFERENCE_NUM_THREADS": order.threads * order.streams,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": order.streams,
            "ENABLE_CPU_PINNING": False,  # two processes would pin themselves to the same core
        }
        compiled = core.compile_model(order.folder / "model.onnx", "CPU", settings)
        places = {name: place for place, out in enumerate(compiled.outputs) for name in out.names}
        self._tensor, self._outputs = openvino.Tensor, [places[name] for name in OUTPUTS]
        self._free: LifoQueue[Any] = LifoQueue()
        for _ in range(order.streams):
            self._free.put(compiled.create_infer_request())

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch; it waits where every stream is busy."""
        image, request = (
            np.ascontiguousarray(batch),
            self._free.get(),
        )  # a shared tensor does not keep `image`
        try:
            request.set_tensor("image", self._tensor(image, shared_memory=True))
            request.infer()
            return Answers(*(np.array(request.get_output_tensor(place).data) for place in self._outputs))
        finally:
            self._free.put(request)


class OnnxRuntime:
    """model.onnx on a CPU, or by the CUDA or TensorRT provider."""

    def __init__(self, order: Order) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = order.threads
        provider, settings = PROVIDERS[order.engine]
        if provider not in onnxruntime.get_available_providers():
            raise DeviceMissing(
                f"This onnxruntime has no {provider}.", "Install onnxruntime-gpu, or use a CPU."
            )
        if provider != "CPUExecutionProvider":
            settings = {**settings, "device_id": order.number}
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if order.precision == "f16":
            settings = {**settings, "trt_fp16_enable": True}
        model, providers = order.folder / "model.onnx", [(provider, settings)]
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        except Exception as error:
            if "CPU EP" not in str(error):
                raise
            told = f"{provider} cannot start here, or leaves nodes of this model to the CPU."
            raise DeviceMissing(told, "See onnxruntime's log, or choose another engine.") from error

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch."""
        return Answers(*self._session.run(list(OUTPUTS), {"image": batch}))


class Torch:
    """program.pt2: the reference. The file can hide code, so verify the package's signature first."""

    def __init__(self, order: Order) -> None:
        import torch
        import torch.export.passes

        kind = device_kind(order.engine)
        if kind == "cuda" and order.number >= torch.cuda.device_count():
            raise DeviceMissing(
                f"There is no cuda:{order.number}; torch sees {torch.cuda.device_count()} of them.",
                "Mend the driver or FORMULARY_DEVICES, or choose an engine for the CPU.",
            )
        torch.set_num_threads(order.threads)
        program = torch.export.load(order.folder / PROGRAM)
        self._torch, self._device = torch, torch.device(kind, order.number)
        if kind == "cuda":
            program = torch.export.passes.move_to_device_pass(program, str(self._device))
        self._network: Any = program.module()
        self._half = {"bf16": torch.bfloat16, "f16": torch.float16}.get(order.precision)
        for weight in self._network.parameters() if self._half else ():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch."""
        torch, kind = self._torch, self._device.type
        image = torch.from_numpy(batch).to(self._device)
        if self._half and image.ndim == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(kind, self._half, enabled=self._half is not None):
            return Answers(*(out.float().cpu().contiguous().numpy() for out in self._network(image)))


ENGINES: dict[str, tuple[Callable[[Order], Any], tuple[str, ...]]] = {
    "openvino": (OpenVino, ("f32", "bf16")),
    "onnxruntime": (OnnxRuntime, ("f32",)),
    "onnxruntime-cuda": (OnnxRuntime, ("f32",)),
    "onnxruntime-tensorrt": (OnnxRuntime, ("f32", "f16")),
    "torch": (Torch, ("f32", "bf16")),
    "torch-cuda": (Torch, ("f32", "bf16", "f16")),
}
PROVIDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnxruntime": ("CPUExecutionProvider", {}),
    "onnxruntime-cuda": ("CUDAExecutionProvider", {"use_tf32": 0}),  # TF32 is no f32
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", {}),
}


def device_kind(engine: str) -> str:
    """`cpu` or `cuda`: what an engine runs on, by its name, with or without the precision."""
    return "cuda" if engine.partition("/")[0].endswith(("-cuda", "-tensorrt")) else "cpu"


def open_engine(
    folder: Path, engine: str, precision: str, threads: int = 1, **placing: Unpack[Placing]
) -> Engine:
    """Open a package's model.

    Args:
        folder: the package.
        engine: a name of `ENGINES`.
        precision: one that the engine has.
        threads: of one call.
        placing: how many calls at the same time, and on which device.

    Raises:
        ConfigError: no such engine or precision, or not on this kind of device.
        DeviceMissing: the device is not there, or cannot do it.
        TrustError: the file cannot be compiled.
    """
    name = f"{engine}/{precision}"
    if engine not in ENGINES or precision not in ENGINES[engine][1]:
        known = ", ".join(f"{each}/{one}" for each, (_, many) in ENGINES.items() for one in many)
        raise ConfigError(f"No engine {name}.", f"Engines: {known}; why not int8: docs/services.md.")
    kind, _, number = placing.get("device", device_kind(engine)).partition(":")
    if kind != device_kind(engine):
        raise ConfigError(f"{name} runs on {device_kind(engine)}, not on {kind}.", "Set FORMULARY_ENGINE.")
    if engine.startswith("torch") and not (folder / PROGRAM).exists():
        raise TrustError("This version came as ONNX and has no program for torch.", "Take another engine.")
    order = Order(folder, engine, precision, threads, placing.get("streams", 1), int(number or 0))
    try:
        opened: Engine = ENGINES[engine][0](order)
    except FormularyError:
        raise
    except Exception as error:  # onnxruntime's own errors have no class in common
        raise TrustError(
            f"{engine} cannot open the package {folder.name[:12]} ({type(error).__name__}).",
            "Build it again.",
        ) from error
    opened.name = name
    return opened


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
