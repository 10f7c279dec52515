"""From a split to weights, bit for bit the same on one machine."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from imaging.config import FitSection, Places, TaskSection
from imaging.errors import ConfigError, DataError
from imaging.vocabulary import Kind, Split
from registry.architectures import build
from training.augmentation import augment, draw_augmentation
from training.datasets import Dataset, load_split, stage_folder


def fit(places: Places, task: str, section: TaskSection) -> dict[str, Any]:
    """Train, keep the epoch with the least validation loss, write weights.safetensors and history.json.

    Returns:
        The history: loss and validation loss of each epoch, and how it was made. Seconds are not in it, so
        that two clean runs write the same bytes.

    Raises:
        ConfigError: the device is not there, or a batch is larger than the training set.
        DataError: the validation loss was never a number.
    """
    import torch
    from safetensors.torch import save_file

    how = section.fit
    device = _device(how.device)
    _settle(how)
    train = load_split(places, task, section, Split.TRAIN)
    validation = load_split(places, task, section, Split.VALIDATION)
    network = build(how.architecture, len(section.classes)).to(device)
    best, epochs = _train(network, (train, validation), section, device)
    folder = stage_folder(places, task, "fit")
    save_file({name: best[name].contiguous() for name in sorted(best)}, folder / "weights.safetensors")
    history = {
        "epochs": epochs, "threads": how.threads, "device": how.device, "seed": how.seed,
        "parameters": sum(value.numel() for value in network.parameters()),
        "torch": torch.__version__.split("+")[0],
        "images": len(train.images), "validation_images": len(validation.images),
    }  # fmt: skip
    (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    return history


def _train(
    network: Any, data: tuple[Dataset, Dataset], section: TaskSection, device: Any
) -> tuple[Any, list[Any]]:
    import torch

    train, validation = data
    how = section.fit
    steps = len(train.images) // how.batch_size
    if not steps:
        raise ConfigError(
            f"A batch of {how.batch_size} is more than the {len(train.images)} training images.",
            "Lower `fit.batch_size` in params.yaml.",
        )
    optimiser = torch.optim.AdamW(network.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, how.learning_rate, total_steps=max(2, how.epochs * steps)
    )
    loss = _loss(section, train).to(device)
    best, least, epochs = None, float("inf"), []
    with _progress() as progress:
        bar = progress.add_task(f"fit {section.title}", total=how.epochs * steps)
        for epoch in range(1, how.epochs + 1):
            total = 0.0
            for images, truth in _batches(train, how, epoch):
                total += _step(network, optimiser, loss, (images.to(device), truth.to(device)))
                schedule.step()
                progress.advance(bar)
            found = _validate(network, validation, loss, device)
            epochs.append({"epoch": epoch, "loss": total / steps, "validation_loss": found})
            if found < least:  # never true of NaN
                best = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
                least = found
    if best is None:
        raise DataError("The validation loss was never a number.", "Lower `fit.learning_rate`.")
    return best, epochs


def _progress() -> Any:
    """A bar on stderr that says how long it took: the seconds are printed and never written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _batches(data: Dataset, how: FitSection, epoch: int) -> Any:
    """Shuffled, augmented batches, drawn from (seed, epoch, batch) alone; a short last one is left out."""
    import torch

    order = np.random.default_rng([how.seed, epoch]).permutation(len(data.images))
    for batch in range(len(order) // how.batch_size):
        rows = np.sort(order[batch * how.batch_size : (batch + 1) * how.batch_size])
        draw = draw_augmentation(how.augmentation, len(rows), np.random.default_rng([how.seed, epoch, batch]))
        yield augment(torch.from_numpy(data.images[rows]), torch.from_numpy(data.truth[rows]), draw)


def _step(network: Any, optimiser: Any, loss: Any, batch: tuple[Any, Any]) -> float:
    import torch

    network.train()
    optimiser.zero_grad()
    value = loss(network(batch[0])[0], batch[1])
    value.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
    return float(value.detach())


def _validate(network: Any, data: Dataset, loss: Any, device: Any) -> float:
    import torch

    network.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(data.images), 64):
            images = torch.from_numpy(data.images[start : start + 64]).to(device)
            truth = torch.from_numpy(data.truth[start : start + 64]).to(device)
            total += float(loss(network(images)[0], truth)) * len(images)
    return total / len(data.images)


def _loss(section: TaskSection, train: Dataset) -> Any:
    """MONAI's Dice + cross entropy for masks; cross entropy with balanced class weights for labels."""
    import torch

    if section.kind is Kind.CLASSIFICATION:
        counts = np.bincount(train.truth, minlength=len(section.classes))
        weight = torch.tensor(len(train.truth) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)
        return torch.nn.CrossEntropyLoss(weight)
    from monai.losses import DiceCELoss

    class MaskLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)

        def forward(self, logits: Any, truth: Any) -> Any:
            return self.inner(logits, truth[:, None])

    return MaskLoss()


def _settle(how: FitSection) -> None:
    """Threads, seeds and algorithms that give the same bits each time."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(how.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(how.seed)


def _device(name: str) -> Any:
    import torch

    kind, _, number = name.partition(":")
    count = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}[kind]
    if int(number or 0) >= count:
        raise ConfigError(f"There is no {name} here.", "Set `fit.device` in params.yaml to cpu.")
    return torch.device(name)
