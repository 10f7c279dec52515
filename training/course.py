"""One network on its way to its weights: what it is taught by, and all that the next step depends on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np

from imaging.detection import STRIDE, encode_lesions
from imaging.errors import ConfigError
from imaging.recipe import FitSection, TaskSection
from imaging.vocabulary import Kind
from registry.architectures import detector_loss
from training.augmentation import augment, draw_augmentation
from training.datasets import Dataset


class Course:
    """A network in training.

    Attributes:
        best: state dict of the epoch with the least validation loss, on the CPU; empty before one.
        epochs: "epoch", "loss" and "validation_loss" of those that are done.
        spent: cpu_seconds, wall_seconds, and loading_seconds in which the network waited for data.
        steps: batches of an epoch; a short last one is left out.
    """

    def __init__(self, network: Any, section: TaskSection, data: tuple[Dataset, Dataset]) -> None:
        import torch

        how, images = section.fit, len(data[0].images)
        self.steps = images // how.batch_size
        if not self.steps:
            raise ConfigError(
                f"A batch of {how.batch_size} is more than the {images} training images.",
                "Lower `fit.batch_size` in params.yaml.",
            )
        self.device, self.precision = find_device(how), find_precision(how)
        self.network, self.data, self._section = network.to(self.device), data, section
        self._loss = make_loss(section, data[0], self.device)
        self._optimiser = torch.optim.AdamW(
            _groups(network, how), lr=how.learning_rate, weight_decay=how.weight_decay
        )
        self._schedule = _schedule(self._optimiser, how, max(2, how.epochs * self.steps))
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.best: dict[str, Any] = {}
        self.epochs: list[dict[str, Any]] = []
        self.losses: list[Any] = []  # of the epoch that is under way
        self._least, self._stale = float("inf"), 0
        self.spent = dict.fromkeys(("cpu_seconds", "wall_seconds", "loading_seconds"), 0.0)
        self.start_clock()

    @property
    def finished(self) -> bool:
        """All epochs are done, or `patience` of them without a better validation loss."""
        how = self._section.fit
        return len(self.epochs) >= how.epochs or 0 < how.patience <= self._stale

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """What is left of the epoch, shuffled and augmented, drawn from (seed, epoch, batch) alone."""
        import torch

        how, train, epoch = self._section.fit, self.data[0], len(self.epochs) + 1
        self.network.train()
        order = np.random.default_rng([how.seed, epoch]).permutation(len(train.images))
        for batch in range(len(self.losses), self.steps):
            begun = time.perf_counter()
            rows = np.sort(order[batch * how.batch_size : (batch + 1) * how.batch_size])
            generator = np.random.default_rng([how.seed, epoch, batch])
            draw = draw_augmentation(how.augmentation, len(rows), generator)
            images, truth = (torch.from_numpy(np.asarray(part[rows])) for part in (train.images, train.truth))
            images, truth = augment(images, truth, draw)
            truth = pose(self._section.kind, truth)
            self.spent["loading_seconds"] += time.perf_counter() - begun
            yield images.to(self.device), truth.to(self.device)

    def step(self, images: Any, truth: Any) -> None:
        """One step of the optimiser and of the schedule."""
        import torch

        self._optimiser.zero_grad()
        mixed = self.precision is not torch.float32
        with torch.autocast(self.device.type, self.precision) if mixed else nullcontext():
            logits = self.network(images)[0]
        value = self._loss(logits.float(), truth)
        self._scaler.scale(value).backward()
        self._scaler.unscale_(self._optimiser)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._section.fit.clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._schedule.step()
        self.losses.append(value.detach())  # a number only later: asking now would wait for the device

    def end_epoch(self) -> dict[str, Any]:
        """Validate, keep the weights if they are the best so far, and tell the epoch's losses."""
        found = self._validate()
        total = sum(float(loss) for loss in self.losses)
        told = {"epoch": len(self.epochs) + 1, "loss": total / self.steps, "validation_loss": found}
        self.losses, self._stale = [], self._stale + 1
        self.epochs.append(told)
        if found < self._least:  # never true of NaN
            self._least, self._stale = found, 0
            self.best = {k: value.detach().cpu().clone() for k, value in self.network.state_dict().items()}
        return told

    def _validate(self) -> float:
        """Loss in float32, as the packaged weights will be used; in batches of 64 planes."""
        import torch

        self.network.eval()
        data, total = self.data[1], 0.0
        size = 64 if data.images.ndim == 4 else self._section.fit.batch_size
        with torch.no_grad():
            for start in range(0, len(data.images), size):
                part = slice(start, start + size)
                images, truth = (torch.from_numpy(np.array(each[part])) for each in (data.images, data.truth))
                logits = self.network(images.to(self.device))[0]
                loss = self._loss(logits, pose(self._section.kind, truth).to(self.device))
                total += float(loss) * len(images)
        return total / len(data.images)

    def start_clock(self) -> None:
        """Count from now."""
        self._clock = time.perf_counter(), time.process_time()

    def stop_clock(self) -> dict[str, float]:
        """Count until now; what was spent, and how fast training went so far."""
        now = time.perf_counter(), time.process_time()
        for name, before, after in zip(("wall_seconds", "cpu_seconds"), self._clock, now, strict=True):
            self.spent[name] += after - before
        self._clock = now
        images = self.done * self._section.fit.batch_size
        return {**self.spent, "images_per_second": images / self.spent["wall_seconds"]}

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.epochs) * self.steps + len(self.losses)

    def describe(self) -> str:
        """Where it stands, in words: epoch, losses, images a second."""
        epochs = self._section.fit.epochs
        words = f"epoch {min(len(self.epochs) + 1, epochs)} of {epochs}"
        if self.losses:
            words += f", loss {float(self.losses[-1]):.4f}"
        if self.epochs:
            words += f", validation {self.epochs[-1]['validation_loss']:.4f}"
        return f"{words}, {self.stop_clock()['images_per_second']:,.0f} images/s"

    def state(self) -> dict[str, Any]:
        """All of it, with the state of torch's generators: `load_state` goes on with the same bits."""
        import torch

        self.stop_clock()
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        own = self.device.type != "cpu"
        return parts | {
            "best": self.best, "epochs": self.epochs, "losses": [float(loss) for loss in self.losses],
            "least": self._least, "stale": self._stale, "spent": self.spent, "random": torch.get_rng_state(),
            "device_random": torch.get_device_module(self.device).get_rng_state(self.device) if own else None,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        import torch

        moments = state["optimiser"]["state"]  # JSON made text of the numbers of the parameters
        state["optimiser"]["state"] = {int(number): moment for number, moment in moments.items()}
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.best, self.epochs, self.losses = state["best"], state["epochs"], state["losses"]
        self._least, self._stale, self.spent = state["least"], state["stale"], state["spent"]
        torch.set_rng_state(state["random"])
        if state["device_random"] is not None:
            torch.get_device_module(self.device).set_rng_state(state["device_random"], self.device)
        self.start_clock()

    def _parts(self) -> dict[str, Any]:
        return {"network": self.network, "optimiser": self._optimiser,
                "schedule": self._schedule, "scaler": self._scaler}  # fmt: skip


def _groups(network: Any, how: FitSection) -> list[dict[str, Any]]:
    """Parameters, those that came from a file with a rate of their own."""
    named, borrowed = list(network.named_parameters()), set(getattr(network, "borrowed", ()))
    if how.backbone_rate == 1 or not borrowed:
        return [{"params": [value for _, value in named]}]
    return [
        {"params": [value for name, value in named if name not in borrowed]},
        {"params": [value for name, value in named if name in borrowed],
         "lr": how.learning_rate * how.backbone_rate},
    ]  # fmt: skip


def _schedule(optimiser: Any, how: FitSection, steps: int) -> Any:
    from torch.optim import lr_scheduler

    if how.schedule == "one-cycle":
        rates = [group["lr"] for group in optimiser.param_groups]
        return lr_scheduler.OneCycleLR(optimiser, rates, total_steps=steps)
    if how.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimiser, steps)
    return lr_scheduler.ConstantLR(optimiser, factor=1.0)


def settle(how: FitSection) -> None:
    """Threads, seeds and algorithms that give the same bits each time."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(how.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(how.seed)


def find_device(how: FitSection) -> Any:
    """The torch device of `fit.device`.

    Raises:
        ConfigError: it is not there.
    """
    import torch

    kind, _, number = how.device.partition(":")
    count = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}[kind]
    if int(number or 0) >= count:
        raise ConfigError(f"There is no {how.device} here.", "Set `fit.device` in params.yaml to cpu.")
    return torch.device(how.device)


def find_precision(how: FitSection) -> Any:
    """The torch dtype of the network's arithmetic: bfloat16 where it is mixed, float16 on older CUDA devices.

    Raises:
        ConfigError: the device is not there, or has neither.
    """
    import torch

    kind = find_device(how).type
    if not how.mixed_precision:
        return torch.float32
    if kind == "cuda":
        known = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if known else torch.float16
    mps = kind == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
    if not mps and not (kind == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        raise ConfigError(
            f"The {kind} of this machine has no bfloat16.",
            "Set `fit.mixed_precision` in params.yaml to false.",
        )
    return torch.bfloat16


def make_loss(section: TaskSection, train: Dataset, device: Any) -> Callable[[Any, Any], Any]:
    """From logits and a truth as `pose` gives it to a scalar.

    Labels: cross entropy, its classes weighed by `fit.class_weights`. Masks: MONAI's Dice and cross entropy,
    whose Dice part counts each class alike whatever its share, so class weights are not applied. Detection:
    the detector's own loss.
    """
    import torch

    if section.kind is Kind.DETECTION:
        return detector_loss
    if section.kind is Kind.SEGMENTATION:
        from monai.losses import DiceCELoss

        inner = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        return lambda logits, truth: inner(logits, truth[:, None])
    if section.fit.class_weights == "none":
        return torch.nn.CrossEntropyLoss()
    counts = np.bincount(train.truth, minlength=len(section.classes))
    weight = torch.tensor(len(train.truth) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)
    return torch.nn.CrossEntropyLoss(weight.to(device))


def pose(kind: Kind, truth: Any) -> Any:
    """The truth of a batch as its loss wants it.

    Args:
        kind: of the task.
        truth: int64 tensor, labels (n,) or masks (n[, depth], rows, columns).

    Returns:
        The same; for detection the float32 targets (n, 4, rows/4, columns/4) of the masks' lesions.
    """
    import torch

    if kind is Kind.DETECTION:
        return torch.from_numpy(encode_lesions(truth.numpy(), STRIDE))
    return truth
