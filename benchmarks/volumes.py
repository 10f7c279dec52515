"""A volume segmented by windows: ours against MONAI's plain sliding_window_inference, in one run.

The volume is 128 x 128 x 96 voxels of 2 mm, T1 MR: the ICBM152 average brain (without a skull), deformed and
acquired as training/cohorts/brain_tissue.py does it. The network is the 3D U-Net of MONAI's spleen tutorial
(five levels, two residual units, batch norm), trained here for minutes on other virtual subjects, so that a
Dice score means something. Same network, window, overlap and blending; from stored pixels to labels,
preparation included, on one thread each. MONAI runs the torch module in float32, a window at a time and, as
the tutorial does, four at a time. Ours is `services.volumes.segment`: the windows where the body is, each
engine in batches. Rounds take turns; times are medians, in seconds of waiting and of CPU. `whole volume` does
not look for the body: what remains is the engine's share.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, whose names shadow departments

from imaging.preparation import Percentiles, prepare
from imaging.terminal import print_table
from imaging.vocabulary import Kind, Modality
from registry.engines import open_engine
from registry.graphs import export_graphs
from registry.package import Contract
from services import volumes
from training.cohorts.brain_tissue import SITES, acquire, deform, draw_tissue
from training.cohorts.cases import stream

SHAPE, SPACING_MM, WINDOW = (96, 128, 128), 2.0, (32, 48, 48)
MIDDLE_MM = 12.0  # level of the volume's middle slice, in template coordinates
CLASSES = ("background", "csf", "grey matter", "white matter")
CONTRACT = Contract(
    task="brain-volume", title="Brain tissue", kind=Kind.SEGMENTATION, modality=Modality.MR, classes=CLASSES,
    positive=CLASSES[1:], channels=1, depth=WINDOW[0], rows=WINDOW[1], columns=WINDOW[2], spacing_low_mm=1.5,
    spacing_high_mm=2.5, png_offset=0, max_batch=8, preparation=Percentiles(low=2.0, high=98.0),
    temperature=1, threshold=0.5, tolerance={}, intended_use="a benchmark", simulated="subjects and scanners",
    limits=(), lineage={},
)  # fmt: skip
ENGINES = ("openvino/f32", "openvino/bf16", "onnxruntime/f32", "torch/f32", "torch/bf16")


def make_volume(subject: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored pixels, float32, and the true classes of one virtual subject."""
    body, rng = stream(1, "bench-volumes", "north", subject), stream(1, "bench-volumes", "north", subject, 0)
    levels = MIDDLE_MM + (np.arange(SHAPE[0]) - (SHAPE[0] - 1) / 2) * SPACING_MM
    tissue, mask = draw_tissue(deform(body, levels, SHAPE[1:], SPACING_MM), body)
    return acquire(tissue, SITES["north"], rng).astype(np.float32), mask


def build() -> Any:
    """The tutorial's network, with the outputs that a package has."""
    import torch
    from monai.networks.nets import UNet

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet(
                3, 1, len(CLASSES), (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch"
            )

        def forward(self, image: Any) -> tuple[Any, Any, Any]:
            logits = self.unet(image)
            return logits, 1 - torch.softmax(logits, 1).amax(1), logits.mean((2, 3, 4))

    torch.manual_seed(0)
    return Network()


def train(subjects: int, steps: int) -> Any:
    """Fitted to windows of some subjects."""
    import torch

    network = build()
    cases = [make_volume(subject) for subject in range(1, subjects + 1)]
    cases = [(prepare(pixels, CONTRACT.preparation)[0], mask) for pixels, mask in cases]
    rng = np.random.default_rng(0)
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, steps)
    for _ in range(steps):
        drawn = []
        for _ in range(4):
            pixels, mask = cases[rng.integers(len(cases))]
            low = [rng.integers(side - window + 1) for side, window in zip(SHAPE, WINDOW, strict=True)]
            place = tuple(slice(start, start + window) for start, window in zip(low, WINDOW, strict=True))
            drawn.append((pixels[place], mask[place]))
        images, truth = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(images[:, None])[0], truth.long()).backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def run_monai(network: Any, pixels: np.ndarray, size: int) -> np.ndarray:
    """MONAI's call on the whole volume, torch float32."""
    import torch
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        image = torch.from_numpy(prepare(pixels, CONTRACT.preparation))[None]
        logits = sliding_window_inference(
            image, WINDOW, size, network.unet, overlap=volumes.OVERLAP, mode="gaussian"
        )
        return logits.argmax(1)[0].numpy().astype(np.uint8)


def run_ours(engine: Any, pixels: np.ndarray) -> np.ndarray:
    """What the worker of jobs does with a volume that is alone."""
    work = volumes.segment(pixels, CONTRACT)
    step = next(work)
    while True:
        try:
            step = work.send(engine.run(step.images).logits)
        except StopIteration as done:
            return done.value


def run_whole(engine: Any, pixels: np.ndarray) -> np.ndarray:
    """The same without looking for the body."""
    with mock.patch.object(volumes, "find_body", lambda pixels: np.ones(pixels.shape, bool)):
        return run_ours(engine, pixels)


def score(labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice of each class but the first."""
    return {
        name: float(2 * ((labels == c) & (truth == c)).sum() / ((labels == c).sum() + (truth == c).sum()))
        for c, name in enumerate(CLASSES) if c
    }  # fmt: skip


def score_tissue(labels: np.ndarray, truth: np.ndarray) -> float:
    """Mean Dice of grey and white matter, as the cohort is scored; the thin rim of CSF stands for itself."""
    told = score(labels, truth)
    return (told["grey matter"] + told["white matter"]) / 2


def open_ways(network: Any, folder: Path) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name -> what labels a volume; an engine that this installation does not open is left out, and said."""
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        f"MONAI, torch f32, {size} a batch": lambda pixels, size=size: run_monai(network, pixels, size)
        for size in (1, 4)
    }
    for name in ENGINES:
        try:
            engine = open_engine(folder, *name.split("/"))
        except Exception as error:
            print(f"{name} is not opened: {error}", file=sys.stderr)
            continue
        ways[f"ours, {name}"] = lambda pixels, engine=engine: run_ours(engine, pixels)
        if name == "openvino/f32":
            ways[f"ours, {name}, whole volume"] = lambda pixels, engine=engine: run_whole(engine, pixels)
    return ways


def measure(ways: dict[str, Any], pixels: np.ndarray, truth: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    """Median seconds, Dice against the truth and against MONAI's labels; all take turns."""
    labels = {name: work(pixels) for name, work in ways.items()}  # the first call compiles
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            work(pixels)
            spent[name].append((time.perf_counter() - start, time.process_time() - cpu))
    plain = next(iter(ways))
    seconds, busy = ({name: float(np.median([one[part] for one in times])) for name, times in spent.items()}
                     for part in (0, 1))  # fmt: skip
    best = min(seconds[name] for name in ways if name.startswith("MONAI"))
    dice = {name: score_tissue(labels[name], truth) for name in ways}
    return [{
        "way": name, "seconds": round(seconds[name], 3), "cpu_seconds": round(busy[name], 3),
        "times_plain": round(seconds[plain] / seconds[name], 2),
        "times_best_monai": round(best / seconds[name], 2), "dice": round(dice[name], 4),
        "dice_difference": round(dice[name] - dice[plain], 5),
        "dice_with_monai": round(score_tissue(labels[name], labels[plain]), 5),
        "dice_csf": round(score(labels[name], truth)["csf"], 4),
    } for name in ways]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="A shorter training and fewer rounds.")
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    told = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    network = train(3 if told.quick else 8, 150 if told.quick else 700)
    pixels, truth = make_volume(0)
    with tempfile.TemporaryDirectory() as folder:
        export_graphs(network, CONTRACT, Path(folder))
        rows = measure(open_ways(network, Path(folder)), pixels, truth, 3 if told.quick else 9)
    body = volumes.find_body(pixels)
    context = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1,
        "torch": torch.__version__, "shape": SHAPE, "window": WINDOW, "overlap": volumes.OVERLAP,
        "brain_share": round(float((truth > 0).mean()), 3), "body_share": round(float(body.mean()), 3),
        "windows_of_body": len(list(volumes._walk(body, WINDOW))),
        "windows_of_volume": math.prod(
            len(volumes.cover(0, s, s, w)) for s, w in zip(SHAPE, WINDOW, strict=True)
        ),
    }  # fmt: skip
    names = list(rows[0])
    print_table(
        "A volume of 128 x 128 x 96", [name.replace("_", " ") for name in names],
        [[str(row[name]) for name in names] for row in rows],
    )  # fmt: skip
    print(json.dumps(context))
    if told.json:
        told.json.write_text(json.dumps({"rows": rows, "context": context}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
