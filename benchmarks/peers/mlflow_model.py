"""`mlflow models serve` of a model from code; `python mlflow_model.py FOLDER` saves it."""

import base64
import os
import sys
from pathlib import Path
from typing import Any

import mlflow

sys.path.insert(0, os.environ["BENCH_PEERS"])  # MLflow copies this file away


class Served(mlflow.pyfunc.PythonModel):
    """A model from code."""

    def load_context(self, context: Any) -> None:
        """Open the model once."""
        from model import Model

        self.model = Model(os.environ["BENCH_PACKAGE"], os.environ["BENCH_ENGINE"])

    def predict(self, context: Any, model_input: Any, params: Any = None) -> list[list[float]]:
        """Images in base64: its table cannot hold bytes."""
        return self.model.answer([self.model.decode(base64.b64decode(one)) for one in model_input["image"]])


if __name__ == "__main__":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    signature = ModelSignature(inputs=Schema([ColSpec("string", "image")]))
    mlflow.pyfunc.save_model(
        Path(sys.argv[1]), python_model=__file__, signature=signature, pip_requirements=[]
    )
else:
    mlflow.models.set_model(Served())
