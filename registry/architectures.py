"""The networks that a task may name in params.yaml. A list, not an import path: no code comes from YAML.

Each forward takes float32 (n, channels[, depth], rows, columns) and gives (logits, heat, embedding).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from imaging.config import read_places, suggest
from imaging.errors import ConfigError
from imaging.recipe import Architecture
from registry import backbones

ARCHITECTURES = {
    "cnn": "plain convolutions, 2D or 3D; attention se or cbam",
    "resnet": "residual blocks, 2D or 3D; attention se or cbam; (64, 128, 256, 512) is ResNet-18",
    "densenet": "dense blocks, 2D or 3D; (256, 512, 1024, 1024) is DenseNet-121",
    "mobilenetv2": "MobileNetV2 for planes, grey or RGB, to be pretrained; has its own channels",
    "vit": "a small vision transformer over patches of 8, 2D or 3D; width: last channel, a block a channel",
    "unet": "U-Net, 2D or 3D",
    "attention-unet": "U-Net whose skips are gated by attention, 2D or 3D",
    "detector": "centres and sizes of lesions at every fourth pixel of a plane",
    "ensemble": "the mean probability of its members, classifiers or segmenters of the same task",
}
SEGMENTERS = ("unet", "attention-unet")
PLANES_ONLY, ATTENTIVE = ("mobilenetv2", "detector"), ("cnn", "resnet")
EPSILON = 1e-7  # the least probability of an ensemble, so that its logits are finite


def build(
    architecture: Architecture, shape: tuple[int, ...], classes: int, positive: tuple[int, ...] | None = None
) -> Any:
    """A torch module; weights that no file gives are fresh, drawn from torch's global generator.

    Args:
        architecture: its name and options. A relative `pretrained` lies below the root of the checkout.
        shape: (channels[, depth], rows, columns) of its input.
        classes: how many.
        positive: labels whose evidence a classifier's heat map shows; all but 0 unless told.

    Returns:
        The module. Its attribute `borrowed` names the tensors that came from files.

    Raises:
        ConfigError: the name is not on the list, or options, shape or file do not suit it.
    """
    _check(architecture, shape)
    name = architecture.name
    if name == "ensemble":
        return _ensemble([build(m, shape, classes, positive) for m in architecture.members])
    if name in SEGMENTERS:
        network = _segmenter(architecture, shape, classes)
    elif name == "detector":
        network = _detector(architecture, shape[0])
    else:
        head = Head(classes, positive or tuple(range(1, classes)), architecture.dropout)
        network = _classifier(architecture, shape, head)
    network.borrowed = ()
    if architecture.pretrained:
        network.borrowed = backbones.load_pretrained(network, read_places().root / architecture.pretrained)
    return network


def _check(architecture: Architecture, shape: tuple[int, ...]) -> None:
    name, levels = architecture.name, len(architecture.channels)
    if name not in ARCHITECTURES:
        raise ConfigError(f"No architecture {name[:60]!r}.", suggest(name, ARCHITECTURES, "Architectures"))
    step = {"vit": backbones.PATCH, "detector": 2**levels, **dict.fromkeys(SEGMENTERS, 2 ** (levels - 1))}
    members = {member.name for member in architecture.members}
    rules = (
        (len(shape) > 3 and name in PLANES_ONLY, "reads planes and was given a volume", "cnn or unet"),
        (shape[0] not in (1, 3) and name == "mobilenetv2", "reads grey or RGB", "cnn"),
        (levels < 2 and name in (*SEGMENTERS, "detector"), "needs two levels or more", "longer `channels`"),
        (any(side % step.get(name, 1) for side in shape[1:]),
         f"needs sides that {step.get(name, 1)} divides, and not {shape[1:]}", "fewer `channels`, or crop"),
        (architecture.attention != "none" and name not in ATTENTIVE,
         "has no `attention` to choose", f"{' or '.join(ATTENTIVE)}, or leave it out"),
        (bool(members) != (name == "ensemble"),
         "has `members`" if members else "has no members", "`ensemble` with `members`"),
        (0 < len(members & set(SEGMENTERS)) < len(members) or bool(members & {"ensemble", "detector"}),
         "has members that do not answer alike", "classifiers alone, or segmenters alone"),
        (name == "ensemble" and bool(architecture.pretrained), "has no weights of its own", "it on a member"),
    )  # fmt: skip
    for wrong, fact, fix in rules:
        if wrong:
            raise ConfigError(f"The architecture {name} {fact}.", f"Set {fix} in `fit.architecture`.")


def _classifier(architecture: Architecture, shape: tuple[int, ...], head: Head) -> Any:
    wide, dimensions, kind = architecture.channels, len(shape) - 1, architecture.attention
    coloured = dimensions == 2 and shape[0] in (1, 3)
    channels = 3 if coloured else shape[0]
    if architecture.name == "cnn":
        return classifier(
            backbones.plain(shape[0], wide, dimensions, kind), wide[-1:], replace(head, peaks=True)
        )
    if architecture.name == "vit":
        return classifier(backbones.patches(shape, wide[-1], len(wide)), wide[-1:], head)
    head = replace(head, imagenet=coloured)
    if architecture.name == "mobilenetv2":
        return classifier(backbones.mobile(), backbones.MOBILE_WIDTHS, head)
    if architecture.name == "densenet":
        return classifier(*backbones.dense(channels, wide, dimensions), head)
    return classifier(backbones.residual(channels, wide, dimensions, kind), wide[-1:], head)


@dataclass(frozen=True)
class Head:
    """What a classifier answers.

    Attributes:
        classes: how many.
        positive: labels whose evidence the heat map shows, against the others'.
        dropout: share of features left out while training.
        peaks: pool the maximum of each map beside its mean.
        imagenet: the features want three channels scaled as ImageNet's, from a grey or RGB plane of -1..1.
    """

    classes: int
    positive: tuple[int, ...]
    dropout: float
    peaks: bool = False
    imagenet: bool = False


def classifier(features: Any, widths: tuple[int, ...], how: Head) -> Any:
    """A linear head on pooled maps; heat is the class activation of the positive classes less the others'."""
    import torch
    from torch import nn
    from torch.nn.functional import interpolate

    pools = (torch.amax, torch.mean) if how.peaks else (torch.mean,)
    labels = [label in how.positive for label in range(how.classes)]
    colours = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)
    contrast = [1 / sum(labels) if told else -1 / (how.classes - sum(labels)) for told in labels]

    class Classifier(nn.Module):
        contrast: torch.Tensor
        colours: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.features = features
            self.dropout = nn.Dropout(how.dropout)
            self.head = nn.Linear(len(pools) * sum(widths), how.classes)
            self.register_buffer("contrast", torch.tensor(contrast), persistent=False)
            self.register_buffer("colours", colours, persistent=False)

        def forward(self, image: Any) -> tuple[Any, Any, Any]:
            size, axes = tuple(image.shape[2:]), tuple(range(2, image.ndim))
            mode = "bilinear" if len(size) == 2 else "trilinear"
            if how.imagenet:
                image = ((image + 1) / 2 - self.colours[0]) / self.colours[1]  # repeats a grey channel, too
                image = image.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
            found = self.features(image)
            maps = found if isinstance(found, list) else [found]
            embedding = torch.cat([pool(each, axes) for each in maps for pool in pools], 1)
            weights = torch.split(self.contrast @ self.head.weight, [len(pools) * width for width in widths])
            heat = torch.zeros_like(image[:, :1])
            # Of several maps the last is left out: too coarse for lesions, and it drowns the finer ones.
            for each, weight in zip(maps[:-1] or maps, weights, strict=False):
                seen = torch.einsum("nc...,c->n...", each, weight[: each.shape[1]])[:, None]
                heat = heat + interpolate(seen, size=size, mode=mode, align_corners=False)
            return self.head(self.dropout(embedding)), torch.relu(heat)[:, 0], embedding

    return Classifier()


def _segmenter(architecture: Architecture, shape: tuple[int, ...], classes: int) -> Any:
    """MONAI's U-Nets; heat is 1 - the largest probability, embedding the mean bottleneck."""
    import torch
    from monai.networks.nets import AttentionUnet, UNet

    net, levels = UNet if architecture.name == "unet" else AttentionUnet, len(architecture.channels)

    class Segmenter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = net(
                spatial_dims=len(shape) - 1,
                in_channels=shape[0],
                out_channels=classes,
                channels=architecture.channels,
                strides=(2,) * (levels - 1),
                dropout=architecture.dropout,
            )

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            kept: list[torch.Tensor] = []
            bottom = self._bottom().register_forward_hook(lambda _module, _input, output: kept.append(output))
            logits = self.unet(image)
            bottom.remove()
            heat = 1 - torch.softmax(logits, 1).amax(1)
            return logits, heat, kept[0].mean(tuple(range(2, image.ndim)))

        def _bottom(self) -> torch.nn.Module:
            block: torch.nn.Module = self.unet.model
            for _ in range(levels - 1):
                block = getattr(block, "1").submodule  # both nest: down, (skip, below), up
            return block

    return Segmenter()


def _detector(architecture: Architecture, channels: int) -> Any:
    """Zhou et al., Objects as Points: levels at strides 2, 4, 8, ... added up at 4; heat is the centres'."""
    import torch
    from torch import nn
    from torch.nn.functional import interpolate

    wide = architecture.channels
    width = wide[1]

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, before = nn.ModuleList(), channels
            for after in wide:
                first = [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
                second = [nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
                self.down.append(nn.Sequential(*first, *second))
                before = after
            self.across = nn.ModuleList([nn.Conv2d(after, width, 1) for after in wide[1:]])
            mixed = [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            last = nn.Conv2d(width, 3, 1)
            last.get_parameter("bias").data[0] = -2.2  # nearly every place is no centre
            self.head = nn.Sequential(*mixed, nn.Dropout(architecture.dropout), last)

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            maps = [image]
            for level in self.down:
                maps.append(level(maps[-1]))
            found = self.across[-1](maps[-1])
            for across, level_map in zip(reversed(self.across[:-1]), reversed(maps[2:-1]), strict=True):
                found = interpolate(found, scale_factor=2.0, mode="nearest") + across(level_map)
            logits = self.head(found)
            size = (image.shape[2], image.shape[3])
            heat = interpolate(logits[:, :1].sigmoid(), size=size, mode="bilinear", align_corners=False)
            return logits, heat[:, 0], maps[-1].mean((2, 3))

    return Detector()


def detector_loss(logits: Any, targets: Any) -> Any:
    """Penalty-reduced focal loss of the centres, and L1 of the log sizes where they count.

    Args:
        logits: float (n, 3, rows/4, columns/4), of a detector.
        targets: float32 (n, 4, rows/4, columns/4), of `imaging.detection.encode_lesions`.

    Returns:
        A scalar tensor, per lesion of the batch (per batch where it has none).
    """
    import torch
    from torch.nn.functional import logsigmoid

    logits = logits.float()
    near, counts, centre = targets[:, 0], targets[:, 3], logits[:, 0]
    missed = (1 - centre.sigmoid()) ** 2 * logsigmoid(centre)
    alarmed = (1 - near) ** 4 * centre.sigmoid() ** 2 * logsigmoid(-centre)
    focal = -torch.where(counts > 0, missed, alarmed).sum()
    sizes = ((logits[:, 1:] - targets[:, 1:3]).abs().sum(1) * counts).sum()
    return (focal + sizes / 2) / counts.sum().clamp_min(1)


def _ensemble(members: list[Any]) -> Any:
    """The log of the mean probability of admitted members (the buffer `admitted`, 0 or 1 each)."""
    import torch

    names = tuple(f"members.{number}.{name}" for number, m in enumerate(members) for name in m.borrowed)

    class Ensemble(torch.nn.Module):
        admitted: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.members = torch.nn.ModuleList(members)
            self.register_buffer("admitted", torch.ones(len(members)))
            self.borrowed = names

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, heats, embeddings = zip(*(member(image) for member in self.members), strict=True)
            shares = (self.admitted / self.admitted.sum()).unbind()
            mean, heat = torch.zeros_like(logits[0]), torch.zeros_like(heats[0])
            for share, answer, seen in zip(shares, logits, heats, strict=True):
                mean = mean + share * torch.softmax(answer, 1)
                peak = seen.amax(tuple(range(1, seen.ndim)), keepdim=True).clamp_min(EPSILON)
                heat = heat + share * seen / peak
            heat = heat if mean.ndim == 2 else 1 - mean.amax(1)  # segmenters: where they are unsure
            return mean.clamp_min(EPSILON).log(), heat, torch.cat(embeddings, 1)

    return Ensemble()
