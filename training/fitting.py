"""From a split to weights, bit for bit the same on one machine, also when training was killed on the way."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from imaging.config import Places
from imaging.errors import ConfigError, DataError
from imaging.manifest import digest_file
from imaging.recipe import TaskSection
from imaging.vocabulary import Split
from registry.architectures import build
from registry.tracking import track
from training.checkpoints import Checkpoints, borrowed_files, open_checkpoints
from training.course import Course, find_precision, settle
from training.datasets import Dataset, load_split, stage_folder

ADMITTED = 1.1  # times the best member's validation loss: members of an ensemble above it are left out
WATTS_A_CORE = 10.0  # assumed, not measured; a graphics processor's share is not in it
Data = tuple[Dataset, Dataset]  # training and validation set
Watch = Callable[[dict[str, Any], Any], None]


@dataclass(frozen=True)
class Trained:
    """What training found.

    Attributes:
        weights: state dict of the epoch with the least validation loss, on the CPU.
        epochs: "epoch" from 1, "loss" and "validation_loss" of each; an ensemble's members follow each other,
            with "member" from 0.
        spent: cpu_seconds and wall_seconds of training and validation, what a killed run left included, and
            loading_seconds, the part of the wall time in which the network waited for data.
        resumed: whether it went on from a checkpoint.
        parameters: how many numbers were found.
        members: of an ensemble, each one's recipe and whether it was admitted.
    """

    weights: dict[str, Any]
    epochs: list[dict[str, Any]]
    spent: dict[str, float]
    resumed: bool
    parameters: int
    members: tuple[dict[str, Any], ...] = ()


def fit(places: Places, task: str, section: TaskSection) -> dict[str, Any]:
    """Train, keep the best epoch, write weights.safetensors, history.json and cost.json.

    Training that was killed goes on from its last checkpoint when fit runs again with the same recipe.

    Returns:
        The history: the epochs, and how it was made. Seconds are not in it but in cost.json, so that two
        runs write the same bytes, whether or not one was killed.

    Raises:
        ConfigError: the device is not there or lacks mixed precision, or a batch is larger than the
            training set.
        DataError: the validation loss was never a number, or a checkpoint cannot be written.
    """
    import torch
    from safetensors.torch import load_file, save_file

    how = section.fit
    precision = find_precision(how)
    train_set, validation = (load_split(places, task, section, s) for s in (Split.TRAIN, Split.VALIDATION))
    data = train_set, validation
    keep = open_checkpoints(places.stage(task, "checkpoints"), section, data)
    for path in borrowed_files(how):
        if not (places.root / path).is_file():
            raise ConfigError(
                f"There is no {path}.", "Run the stage that makes it, or mend fit in params.yaml."
            )
    start = load_file(places.root / how.start) if how.start else None
    with track(places.var, task, keep.folder.name, how.model_dump(mode="json")) as run:
        found = find_weights(data, section, keep, lambda told, _: run.log(told), start)
        for told in found.epochs:  # those that were on their way to MLflow when training was killed
            run.log(told)
    folder = stage_folder(places, task, "fit")
    save_file({name: found.weights[name] for name in sorted(found.weights)}, folder / "weights.safetensors")
    history = {
        "epochs": found.epochs, "threads": how.threads, "device": how.device, "seed": how.seed,
        "parameters": found.parameters, "torch": torch.__version__.split("+")[0],
        "images": len(train_set.images), "validation_images": len(validation.images),
        "precision": str(precision).removeprefix("torch."), "members": list(found.members),
        "borrowed": {path: digest_file(places.root / path) for path in borrowed_files(how)},
    }  # fmt: skip
    (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    cost = describe_cost(found) | {"tracked": run.tracked}
    (folder / "cost.json").write_text(json.dumps(cost, indent=1) + "\n")
    keep.remove()
    return history


def describe_cost(found: Trained) -> dict[str, Any]:
    """What training took. Energy is CPU time at an assumed power, for comparison and not for a bill."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    spent = found.spent
    return {
        "cpu_seconds": round(spent["cpu_seconds"], 3), "wall_seconds": round(spent["wall_seconds"], 3),
        "loading_share": round(spent["loading_seconds"] / max(spent["wall_seconds"], 1e-9), 4),
        "peak_rss_mb": round(peak, 1), "watts_a_core_assumed": WATTS_A_CORE,
        "energy_wh": round(spent["cpu_seconds"] * WATTS_A_CORE / 3600, 5), "resumed": found.resumed,
    }  # fmt: skip


def find_weights(
    data: Data,
    section: TaskSection,
    keep: Checkpoints | None = None,
    watch: Watch | None = None,
    start: dict[str, Any] | None = None,
) -> Trained:
    """Train the network of a recipe, or an ensemble's members in turn; writes nothing but checkpoints.

    Args:
        data: training and validation set.
        section: of the task.
        keep: checkpoints to write and to go on from.
        watch: told after each epoch: its losses, cpu_seconds so far and images_per_second; and the network,
            in its evaluation mode. Its own time is not counted.
        start: a state dict to start from, for fine-tuning; fresh weights otherwise.
    """
    settle(section.fit)
    shape, positive = data[0].images.shape[1:], section.positive_labels
    network = build(section.fit.architecture, shape, len(section.classes), positive)
    if start:
        network.load_state_dict(start)
    if not section.fit.architecture.members:
        return train(network, data, section, keep, watch)
    found: list[Trained] = []
    for number in range(len(section.fit.architecture.members)):
        own = _member(section, number)
        tell = watch and partial(_tell_member, watch, number, sum(len(one.epochs) for one in found))
        part = start and network.members[number].state_dict()
        found.append(find_weights(data, own, keep and keep.of_member(number), tell, part))
    return _admit(network, found, section)


def _member(section: TaskSection, number: int) -> TaskSection:
    """The recipe of a member of an ensemble: its architecture, and a seed of its own."""
    how = section.fit
    own = {"architecture": how.architecture.members[number], "seed": how.seed + number}
    return section.model_copy(update={"fit": how.model_copy(update=own)})


def _tell_member(watch: Watch, number: int, before: int, told: dict[str, Any], network: Any) -> None:
    watch({**told, "epoch": told["epoch"] + before, "member": number}, network)


def _admit(network: Any, found: list[Trained], section: TaskSection) -> Trained:
    """The ensemble of trained members; those much worse than the best one have no say."""
    import torch

    losses = [min(v for told in one.epochs if (v := told["validation_loss"]) == v) for one in found]
    members, epochs = [], list[dict[str, Any]]()
    for number, (one, loss) in enumerate(zip(found, losses, strict=True)):
        how = _member(section, number).fit
        members.append({"architecture": how.architecture.name, "seed": how.seed, "epochs": len(one.epochs),
                        "validation_loss": loss, "admitted": loss <= ADMITTED * min(losses)})  # fmt: skip
        epochs += [{**told, "epoch": told["epoch"] + len(epochs), "member": number} for told in one.epochs]
        network.members[number].load_state_dict(one.weights)
    network.admitted.copy_(torch.tensor([float(member["admitted"]) for member in members]))
    spent = {name: sum(one.spent[name] for one in found) for name in found[0].spent}
    parameters, resumed = sum(one.parameters for one in found), any(one.resumed for one in found)
    return Trained(network.state_dict(), epochs, spent, resumed, parameters, tuple(members))


def train(
    network: Any,
    data: Data,
    section: TaskSection,
    keep: Checkpoints | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train one network from the weights that it has; arguments as of `find_weights`.

    Raises:
        ConfigError: the device is not there or lacks mixed precision, or a batch is larger than the set.
        DataError: the validation loss was never a number, or a checkpoint cannot be written.
    """
    course = Course(network, section, data)
    state = keep.latest() if keep else None
    if state:
        course.load_state(state)
    with _progress(section, course) as advance:
        while not course.finished:
            _run_epoch(course, keep, advance)
            told = course.end_epoch()
            if watch:
                watch({**told, **course.stop_clock()}, network)
            course.start_clock()
            if keep:
                keep.save(course.state())
    if not course.best:
        raise DataError("The validation loss was never a number.", "Lower `fit.learning_rate`.")
    parameters = sum(value.numel() for value in network.parameters())
    return Trained(course.best, course.epochs, course.spent, bool(state), parameters)


def _run_epoch(course: Course, keep: Checkpoints | None, advance: Callable[[], None]) -> None:
    for images, truth in course.batches():
        course.step(images, truth)
        advance()
        if keep and keep.due():
            keep.save(course.state())


@contextmanager
def _progress(section: TaskSection, course: Course) -> Iterator[Callable[[], None]]:
    """A bar on stderr: epoch, losses, images a second; in the end how long the network waited for data."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    title, told_at, steps = f"fit {section.title}", 0.0, section.fit.epochs * course.steps
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True) as progress:
        bar = progress.add_task(title, total=steps, completed=course.done)

        def advance() -> None:
            nonlocal told_at
            if time.monotonic() - told_at > 0.5:
                told_at = time.monotonic()
                progress.update(bar, completed=course.done, description=f"{title}: {course.describe()}")

        yield advance
    share = course.spent["loading_seconds"] / course.spent["wall_seconds"]
    progress.console.print(f"{title}: {course.describe()}; data took {share:.0%} of the time", soft_wrap=True)
