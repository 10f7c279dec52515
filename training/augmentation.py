"""Augmentation of whole batches: a draw, and a transform that it determines, so that it can be replayed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import ConfigError
from imaging.recipe import AugmentationSection


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
        rotate_deg: float32 (n,), about the middle of the image (of a volume's axial slices), to the right.
        scale: float32 (n,), factor of size, about the middle of the image (of a volume's axial slices).
        colour: float32 (n, 3), factor of each colour, from black.
        blur_px: float32 (n,), standard deviation of a Gaussian over rows and columns.
    """

    flip: NDArray[np.bool_]
    shift: NDArray[np.int64]
    gain: NDArray[np.float32]
    offset: NDArray[np.float32]
    noise: NDArray[np.float32]
    noise_seed: int
    rotate_deg: NDArray[np.float32]
    scale: NDArray[np.float32]
    colour: NDArray[np.float32]
    blur_px: NDArray[np.float32]

    def to_log(self) -> dict[str, Any]:
        """The draw as JSON can hold it, every bit of it."""
        return {name: np.asarray(value).tolist() for name, value in asdict(self).items()}

    @classmethod
    def from_log(cls, log: dict[str, Any]) -> Draw:
        """The draw that `to_log` wrote."""
        seed = int(log["noise_seed"])
        types: dict[str, Any] = {"flip": np.bool_, "shift": np.int64}
        arrays = {k: np.asarray(v, types.get(k, np.float32)) for k, v in log.items() if k != "noise_seed"}
        return cls(noise_seed=seed, **arrays)


def draw_augmentation(section: AugmentationSection, count: int, generator: np.random.Generator) -> Draw:
    """Draw for a batch of `count` images; the same generator gives the same draw.

    Every part is drawn, also one that is 0, and a new part after all others: turning one on or adding one
    leaves the others as they were.
    """

    def around(middle: float, width: float, *shape: int) -> NDArray[np.float32]:
        return generator.uniform(middle - width, middle + width, (count, *shape)).astype(np.float32)

    return Draw(
        flip=generator.random(count) < (0.5 if section.flip else 0.0),
        shift=generator.integers(-section.shift_px, section.shift_px, (count, 2), endpoint=True),
        gain=around(1, section.gain),
        offset=around(0, section.offset),
        noise=generator.uniform(0, section.noise, count).astype(np.float32),
        noise_seed=int(generator.integers(2**31)),
        rotate_deg=around(0, section.rotate_deg),
        scale=around(1, section.scale),
        colour=around(1, section.colour, 3),
        blur_px=generator.uniform(0, section.blur_px, count).astype(np.float32),
    )


def augment(images: Any, truth: Any, draw: Draw) -> tuple[Any, Any]:
    """Apply a draw: geometry, then blur, then brightness and colour, then noise.

    Args:
        images: float32 tensor (n, channels[, depth], rows, columns), prepared.
        truth: int64 tensor (n,), or masks (n[, depth], rows, columns), which follow geometry alone.
        draw: from `draw_augmentation`, for n images.

    Returns:
        Tensors of the same shapes (the same tensors where nothing was drawn); what comes in from outside is
        each channel's least value, and label 0.

    Raises:
        ConfigError: colours were drawn for images that have none.
    """
    planes = images.reshape(len(images), -1, *images.shape[-2:])  # slices of a volume move alike
    fill = images.flatten(2).amin(2).repeat_interleave(planes.shape[1] // images.shape[1], 1)
    moved = _blur(_move(planes, fill, draw), draw).reshape(images.shape)
    if truth.ndim > 1:
        masks = truth.reshape(len(truth), -1, *truth.shape[-2:])
        truth = _move(masks, masks.new_zeros(masks.shape[:2]), draw).reshape(truth.shape)
    return _shine(moved, draw), truth


def _move(planes: Any, fill: Any, draw: Draw) -> Any:
    """Flip, shift, turn and scale planes (n, planes, rows, columns); from outside comes fill (n, planes)."""
    import torch

    if draw.flip.any():
        flip = torch.from_numpy(draw.flip).to(planes.device)
        planes = torch.where(flip[:, None, None, None], planes.flip(-1), planes)
    if draw.shift.any():
        rows, columns = planes.shape[-2:]
        moved = fill[:, :, None, None].expand(planes.shape).clone()
        for image, source, (down, right) in zip(moved, planes, draw.shift.tolist(), strict=True):
            image[:, max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)] = source[
                :, max(-down, 0) : rows + min(-down, 0), max(-right, 0) : columns + min(-right, 0)
            ]
        planes = moved
    if draw.rotate_deg.any() or (draw.scale != 1).any():
        planes = _turn(planes, fill[:, :, None, None], draw)
    return planes


def _turn(planes: Any, fill: Any, draw: Draw) -> Any:
    """Rotate and scale about the middle; images bilinear, integer masks by the nearest pixel."""
    import torch

    rows, columns = planes.shape[-2:]
    angle, size = np.radians(draw.rotate_deg, dtype=np.float64), draw.scale.astype(np.float64)
    along, across = np.cos(angle) / size, np.sin(angle) / size
    none = np.zeros_like(along)
    # grid_sample's axes run from -1 to 1 whatever the number of pixels, so a turn must know the proportions.
    back = [[along, across * rows / columns, none], [-across * columns / rows, along, none]]
    theta = torch.from_numpy(np.moveaxis(np.array(back, np.float32), 2, 0).copy()).to(planes.device)
    grid = torch.nn.functional.affine_grid(theta, list(planes.shape), align_corners=False)
    dense = planes.is_floating_point()
    turned = torch.nn.functional.grid_sample(
        (planes - fill).float(), grid, "bilinear" if dense else "nearest", "zeros", align_corners=False
    )
    return turned.to(planes.dtype) + fill


def _blur(planes: Any, draw: Draw) -> Any:
    """Gaussian over rows, then columns, each image with its own width; the border is repeated outwards."""
    import torch

    if not draw.blur_px.any():
        return planes
    reach = int(np.ceil(3 * draw.blur_px.max()))
    steps = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (steps / np.maximum(draw.blur_px.astype(np.float64), 1e-3)[:, None]) ** 2)
    taps = torch.from_numpy((weights / weights.sum(1, keepdims=True)).astype(np.float32)).to(planes.device)
    for axis, pad in ((-2, (0, 0, reach, reach)), (-1, (reach, reach, 0, 0))):
        size = planes.shape[axis]
        wide = torch.nn.functional.pad(planes, pad, mode="replicate")
        planes = torch.zeros_like(planes)
        for step in range(len(steps)):
            planes.addcmul_(wide.narrow(axis, step, size), taps[:, step, None, None, None])
    return planes


def _shine(images: Any, draw: Draw) -> Any:
    """Gain and offset, colour, noise, on images of any shape."""
    import torch

    def spread(values: NDArray[np.float32]) -> Any:
        tensor = torch.from_numpy(values).to(images.device)
        return tensor.reshape(*values.shape, *(1,) * (images.ndim - values.ndim))

    if (draw.gain != 1).any() or draw.offset.any():
        images = images * spread(draw.gain) + spread(draw.offset)
    if (draw.colour != 1).any():
        if images.shape[1] != 3:
            raise ConfigError(
                f"Augmentation draws colours, and the images have {images.shape[1]} channel(s).",
                "Set fit.augmentation.colour to 0 in params.yaml.",
            )
        images = (images + 1) * spread(draw.colour) - 1  # black is -1
    if draw.noise.any():
        generator = torch.Generator().manual_seed(draw.noise_seed)  # of the CPU: the same on every device
        images = images + spread(draw.noise) * torch.randn(images.shape, generator=generator).to(
            images.device
        )
    return images
