"""Augmentation of whole batches: a draw, and a transform that it determines, so that it can be replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import AugmentationSection


@dataclass(frozen=True)
class Draw:
    """What happens to each of n images; `noise_seed` makes the noise again.

    Attributes:
        flip: bool (n,), left and right change sides.
        shift: int (n, 2), rows and columns, in pixels.
        gain: float32 (n,), factor.
        offset: float32 (n,), prepared units.
        noise: float32 (n,), standard deviation in prepared units.
        noise_seed: of the noise field.
    """

    flip: NDArray[np.bool_]
    shift: NDArray[np.int64]
    gain: NDArray[np.float32]
    offset: NDArray[np.float32]
    noise: NDArray[np.float32]
    noise_seed: int


def draw_augmentation(section: AugmentationSection, count: int, generator: np.random.Generator) -> Draw:
    """Draw for a batch of `count` images; the same generator gives the same draw."""
    return Draw(
        flip=generator.random(count) < (0.5 if section.flip else 0.0),
        shift=generator.integers(-section.shift_px, section.shift_px, (count, 2), endpoint=True),
        gain=generator.uniform(1 - section.gain, 1 + section.gain, count).astype(np.float32),
        offset=generator.uniform(-section.offset, section.offset, count).astype(np.float32),
        noise=generator.uniform(0, section.noise, count).astype(np.float32),
        noise_seed=int(generator.integers(2**31)),
    )


def augment(images: Any, truth: Any, draw: Draw) -> tuple[Any, Any]:
    """Apply a draw.

    Args:
        images: float32 tensor (n, 1, rows, columns), prepared.
        truth: int64 tensor (n,), or (n, rows, columns); masks follow flips and shifts.
        draw: from `draw_augmentation`, for n images.

    Returns:
        New tensors of the same shapes; what a shift uncovers is the image's least value, and label 0.
    """
    import torch

    dense = truth.ndim == 3
    moved = torch.stack([_move(image, draw, i, float(image.min())) for i, image in enumerate(images)])
    kept = torch.stack([_move(mask[None], draw, i, 0)[0] for i, mask in enumerate(truth)]) if dense else truth
    shape = (len(images), 1, 1, 1)
    gain, offset, noise = (torch.from_numpy(v).reshape(shape) for v in (draw.gain, draw.offset, draw.noise))
    generator = torch.Generator().manual_seed(draw.noise_seed)
    field = torch.randn(images.shape, generator=generator)
    return moved * gain + offset + noise * field, kept


def _move(image: Any, draw: Draw, index: int, fill: float) -> Any:
    """Flip and shift one image, (1, rows, columns); what comes in from outside is `fill`."""
    import torch

    image = image.flip(-1) if draw.flip[index] else image
    down, right = (int(v) for v in draw.shift[index])
    moved = torch.full_like(image, fill)
    rows, columns = image.shape[-2:]
    moved[..., max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)] = image[
        ..., max(-down, 0) : rows + min(-down, 0), max(-right, 0) : columns + min(-right, 0)
    ]
    return moved
