"""From bytes to a prepared image, and from an engine's answer to what the caller reads."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.image import Image
from imaging.preparation import prepare
from imaging.reading import decode
from imaging.statistics import describe
from imaging.vocabulary import Kind
from monitoring.reference import summarise
from registry.contract import Contract
from registry.engines import Answers
from services.encoding import mask_png

NOTICE = "research use only"


@dataclass(frozen=True)
class Taken:
    """A request's image, checked against the contract and prepared: float32 (1, rows, columns)."""

    image: Image
    prepared: NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """What the caller gets (`answer`), and what the journal keeps (`columns`)."""

    answer: dict[str, Any]
    columns: dict[str, float]


def take(body: bytes, content_type: str, contract: Contract) -> Taken:
    """Decode, check and prepare one image.

    Raises:
        ImageError: it cannot be read, or the model was not made for it.
    """
    image = decode(body, content_type, contract.png_offset)
    contract.check(image)
    return Taken(image, prepare(image.pixels, contract.preparation))


def find(taken: Taken, answers: Answers, contract: Contract) -> Found:
    """Read an engine's answer to one image at the contract's operating point.

    Args:
        taken: the image.
        answers: of a batch of one.
        contract: of the package that answered.
    """
    probabilities = contract.probabilities(answers.logits)[0]
    columns = {**describe(taken.prepared), **summarise(contract.kind, contract.classes, probabilities)}
    if contract.kind is Kind.CLASSIFICATION:
        answer = _classify(probabilities, contract)
    else:
        answer = _segment(probabilities, taken.image, contract)
    return Found({**answer, "uncertainty": columns["uncertainty"]}, columns)


def _classify(probabilities: NDArray[np.float32], contract: Contract) -> dict[str, Any]:
    named = {name: float(p) for name, p in zip(contract.classes, probabilities, strict=True)}
    positive = bool(probabilities[1] >= contract.threshold)
    return {"probabilities": named, "positive": positive, "threshold": contract.threshold}


def _segment(probabilities: NDArray[np.float32], image: Image, contract: Contract) -> dict[str, Any]:
    labels = probabilities.argmax(axis=0)
    pixels = {name: int((labels == label).sum()) for label, name in enumerate(contract.classes) if label}
    told: dict[str, Any] = {
        "mask": {"encoding": "image/png;base64", "data": base64.b64encode(mask_png(labels)).decode(),
                 "labels": {str(label): name for label, name in enumerate(contract.classes)}},
        "area_px": pixels,
    }  # fmt: skip
    if image.spacing_mm:
        size = image.spacing_mm[0] * image.spacing_mm[1]
        told["area_mm2"] = {name: round(count * size, 2) for name, count in pixels.items()}
    return told
