"""The folder that is a model version. Its digest covers exactly the named files; one more is refused."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imaging.errors import TrustError
from imaging.manifest import digest_file

FILES = (
    "contract.json",
    "weights.safetensors",
    "model.onnx",
    "program.pt2",
    "golden.npz",
    "reference.parquet",
)


@dataclass(frozen=True)
class Golden:
    """Cases whose answers are known.

    Attributes:
        images: float32 (n, 1, rows, columns), prepared.
        logits: float32 (n, classes[, rows, columns]), of the reference engine (torch, f32).
    """

    images: NDArray[np.float32]
    logits: NDArray[np.float32]


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of each file of a package.

    Raises:
        TrustError: a file is missing, is a link, or does not belong there.
    """
    if not folder.is_dir():
        raise TrustError(f"There is no package at {folder}.", "Run `dvc repro`, or restore var/packages.")
    found = {path.name for path in folder.iterdir()}
    if found != set(FILES):
        raise TrustError(
            f"The package {folder.name} has missing or added files: {sorted(found ^ set(FILES))}.",
            f"A package has exactly {', '.join(FILES)}.",
        )
    if any(not (folder / name).is_file() or (folder / name).is_symlink() for name in FILES):
        raise TrustError(f"The package {folder.name} holds a link or a folder.", "Copy the files themselves.")
    return {name: digest_file(folder / name) for name in FILES}


def digest_package(folder: Path) -> str:
    """Name of a package: `sha256:` and the sha256 over its files' names and digests.

    Raises:
        TrustError: as `digest_files`.
    """
    return combine_digests(digest_files(folder))


def combine_digests(files: dict[str, str]) -> str:
    """Package digest from the digests of its files."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def read_golden(folder: Path) -> Golden:
    """Read golden.npz of a package.

    Raises:
        TrustError: it is damaged.
    """
    try:
        with np.load(folder / "golden.npz", allow_pickle=False) as data:
            return Golden(images=data["images"], logits=data["logits"])
    except (OSError, ValueError, KeyError) as error:
        raise TrustError("golden.npz cannot be read.", "Build the package again.") from error


def shelf(var: Path, digest: str) -> Path:
    """Where a package of this digest is kept."""
    return var / "packages" / digest.removeprefix("sha256:")


def statements_folder(package: Path) -> Path:
    """Where the signed statements about a package are kept: beside it, never in it."""
    return package.with_name(package.name + ".statements")


def shelve(source: Path, var: Path) -> Path:
    """Copy a package to its shelf; whole or not at all, and nothing is overwritten.

    Returns:
        The folder under var/packages.

    Raises:
        TrustError: what lies on the shelf under this digest is something else.
    """
    digest = digest_package(source)
    target = shelf(var, digest)
    if target.exists():
        if digest_package(target) != digest:
            raise TrustError(
                f"{target} was changed after it was shelved.", f"Remove it and register again: rm -r {target}"
            )
        return target
    draft = target.with_name(target.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    draft.rename(target)
    return target
