"""Why a network answers so: what it loses when parts are covered, or the gradient of its answer."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import WrongType
from imaging.vocabulary import Kind, Method
from registry.package import PROGRAM, Contract
from services.volumes import Step

SHARE = {2: 8, 3: 4}  # of an axis that a cover has, by the number of axes
DRAWS = 16
NOISE = 0.15  # standard deviation, in prepared units, of which -1 to 1 are two
CHUNK_VALUES = 2**18
Work = Generator[Step, NDArray[np.float32], NDArray[np.float32]]


def explain(method: str, image: NDArray[np.float32], contract: Contract, folder: Path) -> Work:
    """A heat map of one image by a method.

    Args:
        method: one of `Method`.
        image: prepared, float32 as the contract's shape.
        contract: of a classification or a detection.
        folder: the package, verified: the gradient runs its program.

    Yields:
        Images for the engine; to be sent their logits.

    Returns:
        float32 (rows, columns) or (depth, rows, columns), 0 or more.
    """
    return occlude(image, contract) if method == Method.OCCLUSION else differentiate(image, contract, folder)


def occlude(image: NDArray[np.float32], contract: Contract) -> Work:
    """How much the log odds fall when a place is covered: the mean over all covers that hold it, 0 at least.

    A cover is an eighth of each axis of a plane, a quarter of a volume's, moved by half of itself; it shows
    the mean of a box of half an axis round each pixel, so that it is no bright or dark patch of its own.
    """
    from scipy.ndimage import uniform_filter

    spatial = contract.spatial
    blurred = uniform_filter(image, (1, *(side // 2 for side in spatial)))
    covers = list(_covers(spatial))
    size = max(1, min(contract.max_batch, CHUNK_VALUES // image.size))
    plain = _log_odds((yield Step(image[None], 0.0)), contract)[0]
    fall, held = np.zeros(spatial, np.float32), np.zeros(spatial, np.float32)
    for first in range(0, len(covers), size):
        chunk = covers[first : first + size]
        batch = np.repeat(image[None], len(chunk), axis=0)
        for covered, place in zip(batch, chunk, strict=True):
            covered[(slice(None), *place)] = blurred[(slice(None), *place)]
        odds = _log_odds((yield Step(batch, first / len(covers))), contract)
        for place, told in zip(chunk, odds, strict=True):
            fall[place] += plain - told
            held[place] += 1
    return np.asarray(np.maximum(fall / held, 0), dtype=np.float32)


def differentiate(image: NDArray[np.float32], contract: Contract, folder: Path) -> Work:
    """SmoothGrad: mean absolute gradient of the log odds over noisy copies, the largest of the colours."""
    import torch

    if not (folder / PROGRAM).exists():
        raise WrongType("This version has no program for torch.", "Ask with method=occlusion.")
    network = torch.export.load(folder / PROGRAM).module()
    rng, total = np.random.default_rng(0), np.zeros(image.shape, np.float32)
    for draw in range(DRAWS):
        noisy = image + rng.normal(0, NOISE, image.shape).astype(np.float32)
        leaf = torch.from_numpy(noisy[None]).requires_grad_()
        (found,) = torch.autograd.grad(_torch_odds(network(leaf)[0], contract), leaf)
        total += np.abs(found[0].numpy())
        yield Step(image[None, :0][:0], draw / DRAWS)  # others may have their turn, or cancel
    return np.asarray((total / DRAWS).max(axis=0))


def _covers(spatial: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover every pixel, each moved by half a box."""
    axes = []
    for side in spatial:
        width = max(2, side // SHARE[len(spatial)])
        starts = [*range(0, side - width, max(1, width // 2)), side - width]
        axes.append([slice(start, start + width) for start in starts])
    return itertools.product(*axes)


def _log_odds(logits: NDArray[np.float32], contract: Contract) -> NDArray[np.float64]:
    """Log odds of what is held against the threshold, (n,)."""
    score = np.clip(contract.score(contract.probabilities(logits)).astype(np.float64), 1e-9, 1 - 1e-9)
    return np.asarray(np.log(score / (1 - score)))


def _torch_odds(logits: Any, contract: Contract) -> Any:
    """The same of a batch of one, as torch differentiates it."""
    scaled = logits / contract.temperature
    if contract.kind is Kind.DETECTION:
        return scaled[:, 0].max()
    positive = [label in contract.positive_labels for label in range(len(contract.classes))]
    others = [not told for told in positive]
    return (scaled[:, positive].logsumexp(1) - scaled[:, others].logsumexp(1)).sum()
