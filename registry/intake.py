"""A foreign MONAI bundle, read as data: bounded, within its folder, and nothing of it is run."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from imaging.config import suggest
from imaging.errors import DataError, TrustError
from imaging.manifest import digest_file
from registry.package import combine_digests

MOST_FILES, MOST_BYTES = 1000, 2 * 2**30  # of a bundle, unpacked
MOST_TEXT, MOST_VALUES = 2**20, 20_000  # of a configuration: bytes, and values in it
MODELS = ("models/model.safetensors", "models/model.pt")
NETWORKS = dict.fromkeys((
    "UNet", "AttentionUnet", "BasicUNet", "SegResNet", "DynUNet", "VNet", "HighResNet",
    "DenseNet", "DenseNet121", "DenseNet169", "DenseNet201", "DenseNet264", "EfficientNetBN",
    "ResNet", "resnet10", "resnet18", "resnet34", "resnet50", "SEResNet50", "SEResNet101",
))  # fmt: skip
"""MONAI's networks that may be named: each was seen to answer alike as ONNX."""


@dataclass(frozen=True)
class Bundle:
    """What is taken of a bundle.

    Attributes:
        file: an ONNX file or a state dict.
        digest: sha256 of the bundle, in hexadecimal.
        network: MONAI's class and arguments, of a state dict.
        metadata: metadata.json.
    """

    file: Path
    digest: str
    network: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def open_bundle(source: Path, scratch: Path, part: str | None) -> Bundle:
    """Find model and network of a bundle.

    A models/model.onnx is taken as it is, and no configuration but metadata.json is read. Otherwise the
    network is `network_def` of configs/inference, and nowhere in that file may an expression stand; or it is
    the part that is named, and the rest is not looked at.

    Args:
        source: a folder or a .zip.
        scratch: an empty folder, for what a .zip holds.
        part: a key of configs/inference.

    Raises:
        DataError: it is damaged, too large, or lacks a file.
        TrustError: a link, a path that leaves the folder, an expression, or an unlisted network.
    """
    folder = source
    if source.suffix == ".zip":
        folder = scratch / "bundle"
        _unpack(source, folder)
    files = {path.relative_to(folder).as_posix(): path for path in _list(folder)}
    heads = sorted((name for name in files if f"/{name}".endswith("/configs/metadata.json")), key=len)
    if not heads:
        raise DataError(f"{source.name} has no configs/metadata.json.", "Give a MONAI bundle.")
    top = heads[0].removesuffix("configs/metadata.json")
    metadata = _read_text(files[heads[0]])
    digest = (
        combine_digests({name: digest_file(path) for name, path in files.items()}) if source.is_dir() else ""
    )
    digest = digest.removeprefix("sha256:") or digest_file(source)
    if f"{top}models/model.onnx" in files and part is None:
        return Bundle(files[f"{top}models/model.onnx"], digest, None, metadata)
    config = next(
        (files[one] for end in ("json", "yaml", "yml") if (one := f"{top}configs/inference.{end}") in files),
        None,
    )
    model = next((files[one] for name in MODELS if (one := top + name) in files), None)
    if config is None or model is None:
        raise DataError(f"{source.name} has no {MODELS[1] if config else 'configs/inference.json'}.",
                        "Give a bundle with models/model.onnx, or with weights and network.")  # fmt: skip
    told, key = _read_text(config), part or "network_def"
    if key not in told:
        raise DataError(f"{config.name} has no {key!r}.", suggest(key, told, "Keys"))
    if part is None:
        _check_plain(told, config.name)
    return Bundle(model, digest, read_network(told[key], key), metadata)


def read_network(value: Any, where: str) -> dict[str, Any]:
    """MONAI's class, by its bare name under `_target_`, and arguments that are plain data.

    Raises:
        TrustError: an expression, a reference, or a class that is not on the list; the key is named.
    """
    _check_plain(value, where)
    if not isinstance(value, dict) or "_target_" not in value:
        raise TrustError(
            f"{where} has no `_target_`.", "Name the key of a network: `network: KEY` in the contract's file."
        )
    inner = next(
        (
            path
            for path, one in _walk(value, where)
            if path != where and isinstance(one, dict) and "_target_" in one
        ),
        None,
    )
    if inner or value.get("pretrained"):
        raise TrustError(
            f"{inner or where + '.pretrained'} would make or fetch something else.", "Write plain arguments."
        )
    return {**value, "_target_": value["_target_"].rpartition(".")[2]}


def _check_plain(value: Any, where: str) -> None:
    """Refuse whatever MONAI would run, look up or import."""
    for path, one in _walk(value, where):
        if isinstance(one, str) and one[:1] in ("$", "@", "%"):
            kind = {"$": "an expression", "@": "a reference", "%": "a macro"}[one[0]]
            fix = "Nothing is evaluated. `network: network_def` in the contract's file reads that part alone."
            raise TrustError(f"{path} is {kind}: {one[:60]!r}.", fix)
        for key in one if isinstance(one, dict) else ():
            if str(key).startswith("_") and key not in ("_target_", "_desc_"):
                raise TrustError(
                    f"{path}.{key} steers MONAI's interpreter.", "Nothing is interpreted: leave it out."
                )
        target = one.get("_target_", "UNet") if isinstance(one, dict) else "UNet"
        home, _, name = str(target).rpartition(".")
        if name not in NETWORKS or not f"{home}.".startswith(("monai.networks.nets.", ".")):
            raise TrustError(f"{path}._target_ is {str(target)[:80]!r}.", suggest(name, NETWORKS, "Networks"))


def _walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every value within a value, and its path."""
    left = [(where, value)]
    for _ in range(MOST_VALUES):
        if not left:
            return
        path, one = left.pop()
        yield path, one
        inner = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        left += [(f"{path}.{key}", item) for key, item in inner]
    raise DataError(f"{where} has more than {MOST_VALUES} values.", "Name the network's key alone.")


def _read_text(path: Path) -> dict[str, Any]:
    """JSON or YAML as plain values; aliases are refused, since a few of them can unfold to any size."""
    if path.stat().st_size > MOST_TEXT:
        raise DataError(
            f"{path.name} is larger than {MOST_TEXT >> 10} KiB.", "Leave out what is no configuration."
        )
    try:
        text = path.read_text()
        if path.suffix == ".json":
            told = json.loads(text)
        elif any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise TrustError(f"{path.name} has an alias.", "Write its value.")
        else:
            told = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path.name} cannot be read ({type(error).__name__}).", "Mend the file.") from error
    if not isinstance(told, dict):
        raise DataError(f"{path.name} has no keys.", "Mend the file.")
    return told


def _list(folder: Path) -> list[Path]:
    """Every file of a folder; there may be no links."""
    found = [Path(here) / name for here, folders, names in os.walk(folder) for name in (*folders, *names)]
    wrong = [path for path in found if path.is_symlink() or not (path.is_file() or path.is_dir())]
    if wrong:
        raise TrustError(
            f"{wrong[0].relative_to(folder)} is a link or no file.", "Copy the files themselves."
        )
    files = [path for path in found if path.is_file()]
    _bound(len(files), sum(path.stat().st_size for path in files))
    return files


def _bound(files: int, size: int) -> None:
    if files > MOST_FILES or size > MOST_BYTES:
        raise DataError(
            f"The bundle has {files} files of {size >> 20} MiB.",
            f"At most {MOST_FILES} files and {MOST_BYTES >> 20} MiB.",
        )


def _unpack(source: Path, folder: Path) -> None:
    """Unpack a .zip; no more is written than its table says, and that is bounded first."""
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            _bound(len(members), sum(member.file_size for member in members))
            for member in members:
                _check_member(member)
            archive.extractall(folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise DataError(
            f"{source.name} cannot be unpacked ({type(error).__name__}).", "Pack it again."
        ) from error


def _check_member(member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in member.filename:
        raise TrustError(f"{member.filename[:80]!r} leaves the bundle.", "Pack the bundle's own files.")
    if (member.external_attr >> 28) == 0o12:
        raise TrustError(f"{member.filename[:80]!r} is a link.", "Pack the files themselves.")
