"""BentoML as its documentation has it: a batchable method, and a service in front that depends on it.

Metrics and tracing are off; the runner's sessions are not closed while others use them.
"""

import os
from pathlib import Path

import bentoml
import numpy as np
from model import MAX_BATCH, Model, decode
from numpy.typing import NDArray

from registry.package import read_contract

QUIET = {
    "workers": 1,
    "traffic": {"timeout": 60},
    "metrics": {"enabled": False},
    "tracing": {"excluded_urls": ["/.*"]},
    "logging": {"access": {"enabled": False}},
}


@bentoml.service(**QUIET, runner_connection={"max_requests": 10**9, "max_age": 1e9})
class Runner:
    """Owns the model."""

    def __init__(self) -> None:
        self.model = Model(os.environ["BENCH_PACKAGE"], os.environ["BENCH_ENGINE"])

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)
    def answer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """A batch that BentoML made."""
        return np.array(self.model.answer(list(images)), np.float32)


@bentoml.service(**QUIET)
class Textbook:
    """Decodes, and asks the runner."""

    runner = bentoml.depends(Runner)

    def __init__(self) -> None:
        self.contract = read_contract(Path(os.environ["BENCH_PACKAGE"]))

    @bentoml.api
    async def predict(self, file: Path) -> dict[str, list[float]]:
        """One file of a form."""
        answers = await self.runner.to_async.answer(decode(file.read_bytes(), self.contract)[None])
        return {"probabilities": answers[0].tolist()}
