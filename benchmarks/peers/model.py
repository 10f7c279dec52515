"""What every peer shares: the package that ours serves, on the same engine, without a check of anything."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from imaging.preparation import prepare
from registry.engines import open_engine
from registry.package import Contract, read_contract

MAX_BATCH = 32  # as many as the most clients


def decode(body: bytes, contract: Contract) -> NDArray[np.float32]:
    """A .npy of a plane or a .png of colours, prepared: float32 (channels, rows, columns)."""
    stream = io.BytesIO(body)
    pixels = np.load(stream) if body[:6] == b"\x93NUMPY" else np.asarray(Image.open(stream))
    return prepare(pixels.astype(np.float32), contract.preparation)


class Model:
    """A package on an engine of one thread; batches wait for each other.

    Args:
        package: its folder.
        engine: e.g. openvino/bf16.
    """

    def __init__(self, package: str, engine: str) -> None:
        kind, _, precision = engine.partition("/")
        self.contract = read_contract(Path(package))
        self._engine, self._lock = open_engine(Path(package), kind, precision), Lock()
        for size in (1, MAX_BATCH):
            self.answer([np.zeros(self.contract.shape, np.float32)] * size)

    def decode(self, body: bytes) -> NDArray[np.float32]:
        """One image, prepared."""
        return decode(body, self.contract)

    def answer(self, images: list[NDArray[np.float32]]) -> list[list[float]]:
        """Probabilities of each image."""
        with self._lock:
            logits = self._engine.run(np.stack(images)).logits
        return [list(map(float, row)) for row in self.contract.probabilities(logits)]


def read_arguments() -> tuple[Model, int]:
    """The model and the port that the command line names: PACKAGE ENGINE PORT."""
    package, engine, port = sys.argv[1:4]
    return Model(package, engine), int(port)
