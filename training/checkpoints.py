"""Checkpoints: training that was killed goes on with the bits that it would have had.

A checkpoint is one safetensors file with its plain values as JSON in the header: nothing in it can be
executed, as a pickle could. Its name holds its sha256. They lie in build/<task>/checkpoints, which is no
stage's output: DVC removes the outputs of a stage before it runs it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from imaging.config import read_places
from imaging.errors import DataError
from imaging.manifest import digest_file
from imaging.recipe import FitSection, TaskSection
from training.datasets import Dataset

EVERY_S = 120.0  # within an epoch; at its end a checkpoint is written whatever the time
KEPT = 2
CODE = ("training/fitting.py", "training/course.py", "training/augmentation.py",
        "registry/architectures.py", "registry/backbones.py", "imaging/detection.py")  # fmt: skip
RECIPE = {"fit", "preparation", "kind", "classes", "positive"}


class Checkpoints:
    """The checkpoints of one network's training; the two newest are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._saved = time.monotonic()

    def of_member(self, number: int) -> Checkpoints:
        """Those of a member of an ensemble."""
        return Checkpoints(self.folder / f"member-{number}")

    def due(self) -> bool:
        """Whether so much was done since the last one that it would be missed."""
        return time.monotonic() - self._saved >= EVERY_S

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint: a draft, on the disk as a whole, then its name.

        Args:
            state: dictionaries with text keys, lists, plain values and torch tensors, nested.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors: dict[str, Any] = {}
        plain = json.dumps(_take_tensors(state, tensors))
        present = self._present()
        number = int(present[-1].name.split("-")[0]) + 1 if present else 1
        draft = self.folder / "draft"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, {"state": plain})
            _flush(draft)
            os.replace(draft, self.folder / f"{number:06d}-{digest_file(draft)}.safetensors")
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"No checkpoint could be written in {self.folder}.", "Free space; run fit again: it goes on."
            ) from error
        for old in present[: -(KEPT - 1)]:
            old.unlink()
        self._saved = time.monotonic()

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that holds; damaged ones are named on stderr and removed."""
        from safetensors import safe_open

        for path in reversed(self._present()):
            if digest_file(path) == path.stem.split("-")[1]:
                with safe_open(path, "pt") as file:
                    state: dict[str, Any] = _put_tensors(json.loads(file.metadata()["state"]), file)
                return state
            print(f"The checkpoint {path} is damaged; going on from the one before it.", file=sys.stderr)
            path.unlink()
        return None

    def remove(self) -> None:
        """Remove this recipe's checkpoints, and what other recipes of the task left half-way."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _present(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def open_checkpoints(folder: Path, section: TaskSection, data: tuple[Dataset, Dataset]) -> Checkpoints:
    """The checkpoints of a recipe: all that the weights depend on names their folder, and no other goes on.

    Args:
        folder: build/<task>/checkpoints.
        section: of the task.
        data: training and validation set; their rows (with the sha256 of each image) and truth count.
    """
    import torch

    root = Path(__file__).parents[1]
    borrowed = [read_places().root / path for path in borrowed_files(section.fit)]
    parts = [
        section.model_dump(mode="json", include=RECIPE), torch.__version__,
        [[part.rows.to_json(), hashlib.sha256(part.truth.tobytes()).hexdigest()] for part in data],
        [digest_file(path) for path in (*(root / name for name in CODE), *borrowed) if path.exists()],
    ]  # fmt: skip
    return Checkpoints(folder / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16])


def borrowed_files(how: FitSection) -> list[str]:
    """Files of weights that a recipe begins with, from the root of the checkout."""
    parts = (how.architecture, *how.architecture.members)
    return [path for path in (how.start, *(part.pretrained for part in parts)) if path]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _take_tensors(value: Any, tensors: dict[str, Any]) -> Any:
    """The value with each tensor replaced by its name among `tensors`, where a copy of it is put."""
    if hasattr(value, "detach"):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _take_tensors(part, tensors) for key, part in value.items()}
    return [_take_tensors(part, tensors) for part in value] if isinstance(value, list | tuple) else value


def _put_tensors(value: Any, file: Any) -> Any:
    if isinstance(value, dict):
        told = value.keys() == {"tensor"}
        return (
            file.get_tensor(value["tensor"]) if told else {k: _put_tensors(v, file) for k, v in value.items()}
        )
    return [_put_tensors(part, file) for part in value] if isinstance(value, list) else value
