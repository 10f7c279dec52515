"""Whether data ever starve a network: loading and augmentation against MONAI's, training against a bare loop.

In one run, on one thread, in CPU seconds of this process. Loading: one epoch of CT slices from disk to
augmented batches, with the same flips, shifts, turns, scales and noise: ours (a memory-mapped shard, batched
tensors) and MONAI's (a file and a chain of transforms for each image; the faster of Dataset and
PersistentDataset). Training: `find_weights` with augmentation, validation and checkpoints against a loop that
does nothing but step on tensors in memory, with the same network, batches and number of steps. Also, in
seconds of waiting (and, under `context`, of CPU time): `dvc repro` with nothing to do, where a build is up to
date; and the start of a stage that needs neither torch nor Great Expectations.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, whose `training` is this file

from imaging.config import read_params, read_places
from imaging.recipe import AugmentationSection, TaskSection
from imaging.terminal import print_table
from training.augmentation import augment, draw_augmentation
from training.checkpoints import open_checkpoints
from training.datasets import Dataset, load_rows
from training.fitting import find_weights

TASK, BATCH, SIDE = "lung-nodule", 32, 64
PARTS = AugmentationSection(flip=True, shift_px=4, rotate_deg=10, scale=0.1, noise=0.05)


def write_slices(folder: Path, count: int) -> Any:
    """A shard for us and a file an image for MONAI, of the same pixels; the rows of a manifest."""
    import pandas as pd

    rng = np.random.default_rng(1)
    pixels = rng.normal(-600, 150, (count, SIDE, SIDE)).astype(np.int16)
    labels = np.arange(count) % 2
    pixels[labels == 1, 20:30, 20:30] += 300
    np.save(folder / "images.npy", pixels)
    for number, image in enumerate(pixels):
        np.save(folder / f"{number}.npy", image)
    return pd.DataFrame({"image": "images.npy", "row": range(count), "label": labels})


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process, all its threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def load_ours(folder: Path, rows: Any, section: TaskSection) -> None:
    """From the shard to augmented batches."""
    import torch

    data = load_rows(folder, section, rows)
    order = np.random.default_rng([1, 1]).permutation(len(rows))
    for batch in range(len(order) // BATCH):
        chosen = np.sort(order[batch * BATCH : (batch + 1) * BATCH])
        draw = draw_augmentation(PARTS, BATCH, np.random.default_rng([1, 1, batch]))
        augment(torch.from_numpy(data.images[chosen]), torch.from_numpy(data.truth[chosen]), draw)


def make_monai(folder: Path, rows: Any, section: TaskSection) -> dict[str, Callable[[], None]]:
    """The same epoch as MONAI's tutorials make it, without and with its cache of what is not random."""
    import monai.transforms as mt
    from monai.data import DataLoader, PersistentDataset
    from monai.data import Dataset as PlainDataset

    window, turn = section.preparation, np.radians(PARTS.rotate_deg)
    chain = mt.Compose(
        [
            mt.LoadImaged("image", reader="NumpyReader"),
            mt.EnsureChannelFirstd("image", channel_dim="no_channel"),
            mt.ScaleIntensityRanged("image", window.low_hu, window.high_hu, -1.0, 1.0, clip=True),
            mt.RandFlipd("image", prob=0.5, spatial_axis=1),
            mt.RandAffined(
                "image",
                prob=1.0,
                rotate_range=turn,
                translate_range=PARTS.shift_px,
                scale_range=PARTS.scale,
                padding_mode="border",
            ),
            mt.RandGaussianNoised("image", prob=1.0, std=PARTS.noise),
        ]
    )
    files = [{"image": str(folder / f"{row.row}.npy"), "label": row.label} for row in rows.itertuples()]
    sets = {
        "MONAI Dataset": PlainDataset(files, chain),
        "MONAI PersistentDataset": PersistentDataset(files, chain, cache_dir=folder / "cache"),
    }

    def epoch(images: Any) -> None:
        for _ in DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=0):
            pass

    return {name: lambda images=images: epoch(images) for name, images in sets.items()}


def compare_loading(folder: Path, section: TaskSection, count: int, rounds: int) -> dict[str, float]:
    """Images a CPU second, the median of rounds in which all take turns."""
    rows = write_slices(folder, count)
    ways = {"ours": lambda: load_ours(folder, rows, section), **make_monai(folder, rows, section)}
    for work in ways.values():  # imports, pages of the files, and PersistentDataset's cache
        work()
    spent = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            spent[name].append(cpu_seconds(work))
    images = count // BATCH * BATCH
    return {name: round(images / float(np.median(seconds)), 1) for name, seconds in spent.items()}


def fit_ours(data: tuple[Dataset, Dataset], section: TaskSection) -> None:
    """Everything that `formulary training fit` does between reading data and writing weights."""
    with tempfile.TemporaryDirectory() as folder:
        find_weights(data, section, open_checkpoints(Path(folder), section, data))


def fit_bare(data: Dataset, section: TaskSection) -> None:
    """The loop of every tutorial: no augmentation, validation, schedule, clipping or checkpoint."""
    import torch

    from registry.architectures import build

    how = section.fit
    network = build(how.architecture, data.images.shape[1:], len(section.classes)).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=how.learning_rate)
    loss = torch.nn.CrossEntropyLoss()
    images, truth = torch.from_numpy(data.images), torch.from_numpy(data.truth)
    for _ in range(how.epochs):
        for start in range(0, len(images) - how.batch_size + 1, how.batch_size):
            optimiser.zero_grad()
            part = slice(start, start + how.batch_size)
            loss(network(images[part])[0], truth[part]).backward()
            optimiser.step()


def compare_fitting(
    folder: Path, section: TaskSection, count: int, rounds: int
) -> tuple[dict[str, float], float]:
    """Images a CPU second of training, and ours over the bare loop's, the median of the rounds.

    The validation set has one batch.
    """
    how = section.fit.model_copy(update={"epochs": 2, "threads": 1, "device": "cpu", "patience": 0})
    section = section.model_copy(update={"fit": how})
    rows = write_slices(folder, count + how.batch_size)
    data = load_rows(folder, section, rows)
    train, validation = (data.take(part) for part in np.split(np.arange(len(rows)), [count]))
    ways = {
        "fit": lambda: fit_ours((train, validation), section),
        "bare loop": lambda: fit_bare(train, section),
    }
    few = data.take(np.arange(2 * how.batch_size))
    fit_ours((few, few), section)  # imports
    fit_bare(few, section)
    spent = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            spent[name].append(cpu_seconds(work))
    images = how.epochs * (count // how.batch_size) * how.batch_size
    rates = {name: round(images / float(np.median(seconds)), 1) for name, seconds in spent.items()}
    return rates, round(float(np.median(np.divide(spent["bare loop"], spent["fit"]))), 3)


def wait_for(command: list[str], repeats: int) -> tuple[float, float]:
    """Median seconds of a command, started anew each time: of waiting, and of CPU time."""
    spent, used = [], lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    for _ in range(repeats):
        start, cpu = time.perf_counter(), used()
        subprocess.run(command, cwd=read_places().root, check=True, capture_output=True)
        spent.append((time.perf_counter() - start, used() - cpu))
    wall, cpu = np.median(spent, axis=0).round(3).tolist()
    return wall, cpu


def wait_for_repro(repeats: int) -> tuple[float, float] | tuple[None, None]:
    """Of `dvc repro` with nothing to do; None where there is something: it is not for a benchmark to do."""
    dvc = [sys.executable, "-m", "dvc"]
    asked = subprocess.run([*dvc, "status", "--quiet"], cwd=read_places().root, capture_output=True)
    return wait_for([*dvc, "repro"], repeats) if asked.returncode == 0 else (None, None)


def main() -> None:
    """Measure, print, and write JSON."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half a minute: fewer images, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"})
    section = read_params(read_places()).task(TASK)
    images, rounds = (512, 1) if asked.quick else (1024, 5)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        loading = compare_loading(Path(first), section, images, rounds)
        fitting, ratio = compare_fitting(Path(second), section, images // 2, rounds)
    repeats = 1 if asked.quick else 5
    repro = wait_for_repro(repeats)
    start = wait_for([sys.executable, "-m", "formulary", "training", "split", "--help"], repeats)
    told: dict[str, Any] = {
        "loading_images_per_cpu_s": loading["ours"],
        "monai_images_per_cpu_s": max(rate for name, rate in loading.items() if name != "ours"),
        "fit_over_bare_loop": ratio,
        "noop_repro_s": repro[0],
        "stage_start_s": start[0],
        "context": {
            "loading_images_per_cpu_s": loading,
            "training_images_per_cpu_s": fitting,
            "noop_repro_cpu_s": repro[1],
            "stage_start_cpu_s": start[1],
            "images": images,
            "rounds": rounds,
            "batch": {"loading": BATCH, "training": section.fit.batch_size},
            "network": section.fit.architecture.model_dump(mode="json"),
            "processor": platform.processor() or platform.machine(),
            "threads": 1,
            "torch": torch.__version__,
        },
    }
    report(told)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


def report(told: dict[str, Any]) -> None:
    """A table for people."""
    rows = []
    for what, rates in (("loading", "loading_images_per_cpu_s"), ("training", "training_images_per_cpu_s")):
        found = told["context"][rates]
        ours = next(iter(found.values()))
        rows += [[what, name, f"{rate:,.0f}", f"{ours / rate:.2f}"] for name, rate in found.items()]
    print_table(
        f"{TASK}, {SIDE} x {SIDE}, 1 thread", ["what", "way", "images/CPU s", "ours is x times"], rows
    )
    for what, name in (
        ("dvc repro, nothing to do", "noop_repro"),
        ("start of a stage without torch", "stage_start"),
    ):
        wall, cpu = told[f"{name}_s"], told["context"][f"{name}_cpu_s"]
        print(
            f"{what}: {wall:.2f} s, CPU {cpu:.2f} s" if wall else f"{what}: not measured, the build is stale"
        )


if __name__ == "__main__":
    main()
