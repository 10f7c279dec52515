"""The networks that a task may name in params.yaml. A list, not an import path: no code comes from YAML.

Each forward takes float32 (n, 1, rows, columns) and gives (logits, heat, embedding).
"""

from __future__ import annotations

from typing import Any

from imaging.config import Architecture
from imaging.errors import ConfigError


def build(architecture: Architecture, classes: int) -> Any:
    """A torch module with fresh weights, drawn from torch's global generator.

    Raises:
        ConfigError: the name is not on the list.
    """
    builders = {"unet": _unet, "cnn": _cnn}
    if architecture.name not in builders:
        raise ConfigError(f"No architecture {architecture.name!r}.", f"Architectures: {', '.join(builders)}.")
    return builders[architecture.name](architecture, classes)


def _unet(architecture: Architecture, classes: int) -> Any:
    """MONAI's residual-free 2D U-Net; heat is 1 - the largest probability, embedding the mean bottleneck."""
    import torch
    from monai.networks.nets import UNet

    class Segmenter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet(
                spatial_dims=2,
                in_channels=1,
                out_channels=classes,
                channels=architecture.channels,
                strides=(2,) * (len(architecture.channels) - 1),
                dropout=architecture.dropout,
            )

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            kept: list[torch.Tensor] = []
            bottom = self._bottom().register_forward_hook(lambda _module, _input, output: kept.append(output))
            logits = self.unet(image)
            bottom.remove()
            heat = 1 - torch.softmax(logits, 1).amax(1)
            return logits, heat, kept[0].mean((2, 3))

        def _bottom(self) -> torch.nn.Module:
            block: torch.nn.Module = self.unet.model
            for _ in range(len(architecture.channels) - 1):
                block = getattr(block, "1").submodule  # MONAI nests: down, (skip, below), up
            return block

    return Segmenter()


def _cnn(architecture: Architecture, classes: int) -> Any:
    """Convolutions, a linear layer on their maximum and mean; heat is the class activation of class 1."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = architecture.channels
            blocks: list[nn.Module] = []
            for position, (before, after) in enumerate(zip((1, *wide), wide, strict=False)):
                blocks += [
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                ]
                blocks += [
                    nn.Conv2d(after, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                ]
                blocks += [nn.MaxPool2d(2)] if position < len(wide) - 1 else []
            self.features = nn.Sequential(*blocks)
            self.dropout = nn.Dropout(architecture.dropout)
            self.head = nn.Linear(2 * wide[-1], classes)

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            maps = self.features(image)
            embedding = torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)
            logits = self.head(self.dropout(embedding))
            weight = self.head.weight[1, : maps.shape[1]]
            heat = torch.relu((maps * weight[None, :, None, None]).sum(1, keepdim=True))
            size = (image.shape[2], image.shape[3])
            heat = torch.nn.functional.interpolate(heat, size=size, mode="bilinear", align_corners=False)
            return logits, heat[:, 0], embedding

    return Classifier()
