"""The MLflow face of a package: `mlflow.pyfunc.load_model(...).predict(images)` without this platform.

MLflow runs this file as the model's code: it imports nothing of the house; preparation.py travels along.
"""

import importlib.util
import json
import sys
from typing import Any

import mlflow
import numpy as np


class Face(mlflow.pyfunc.PythonModel):
    """Runs model.onnx with OpenVINO, f32."""

    def load_context(self, context: Any) -> None:
        """Open the contract, the preparation and the model from the version's artefacts."""
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # it tells strangers
        import openvino

        with open(context.artifacts["contract"]) as stream:
            self._contract = json.load(stream)
        spec = importlib.util.spec_from_file_location(
            "formulary_preparation", context.artifacts["preparation"]
        )
        if spec is None or spec.loader is None:
            raise ImportError("preparation.py is missing from the version's artefacts")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # pydantic looks there for the names in annotations
        spec.loader.exec_module(module)
        how = self._contract["preparation"]
        kinds = {"window": module.Window, "percentiles": module.Percentiles, "colour": module.Colour}
        made = kinds[how["kind"]](**how)
        self._prepare: Any = lambda pixels: module.prepare(pixels, made)
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(context.artifacts["model"], "CPU", settings)
        self._request = compiled.create_infer_request()

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Probabilities of raw slices.

        Args:
            context: MLflow's; not used.
            model_input: float (n[, depth], rows, columns[, 3]), CT in HU, MR in any unit, colours 0 to 255,
                as the contract says.
            params: not used.

        Returns:
            float32 (n, classes) or (n, classes[, depth], rows, columns), calibrated; of a detector (n, 1,
            rows / 4, columns / 4): that a lesion has its centre there. Research use only.
        """
        images = np.asarray(model_input, dtype=np.float32)
        told = self._contract
        depth, colours = [told["depth"]] * bool(told["depth"]), [3] * (told["channels"] == 3)
        expected = (*depth, told["rows"], told["columns"], *colours)
        if images.shape[1:] != expected or not np.isfinite(images).all():
            raise ValueError(f"expected finite images of shape (n, *{expected})")
        step = int(self._contract["max_batch"])
        parts = [self._answer(images[start : start + step]) for start in range(0, len(images), step)]
        return np.concatenate(parts)

    def _answer(self, images: np.ndarray) -> np.ndarray:
        self._request.infer({"image": np.stack([self._prepare(image) for image in images])})
        logits = np.array(self._request.get_tensor("logits").data) / np.float32(self._contract["temperature"])
        if self._contract["kind"] == "detection":
            return np.asarray(1 / (1 + np.exp(-logits[:, :1])), dtype=np.float32)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)


mlflow.models.set_model(Face())  # type: ignore[no-untyped-call,unused-ignore]
