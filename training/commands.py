"""The click face of training: read config, call the function, print."""

from __future__ import annotations

from pathlib import Path

import click

from imaging.config import read_params, read_places, read_sites
from imaging.tables import print_table

task_option = click.option("--task", required=True, help="The task: a section of params.yaml.")


@click.group()
def training() -> None:
    """From cohort to model package, stage by stage."""


@training.command()
@task_option
def cohort(task: str) -> None:
    """Build the task's images, masks and manifest."""
    from training.cohorts.building import build_cohort

    places, params = read_places(), read_params(read_places())
    section = params.task(task)
    folder = places.stage(task, "cohort")
    build_cohort(task, section, params.profiles[section.cohort.profile], read_sites(places), folder)
    click.echo(f"{task}: cohort written to {folder}")


@training.command()
@task_option
def split(task: str) -> None:
    """Put every subject on one side: train, validation, test or external."""
    from training.splitting import split_cohort

    places = read_places()
    section = read_params(places).task(task)
    counts = split_cohort(section.split, places.stage(task, "cohort"), places.stage(task, "split"))
    click.echo(f"{task}: subjects " + ", ".join(f"{name} {count}" for name, count in counts.items()))


@training.command()
@task_option
def check(task: str) -> None:
    """Hold the manifest and the pixels to their expectations."""
    from training.expectations import check_cohort
    from training.rules import Question

    places = read_places()
    question = Question(task, read_params(places).task(task), read_sites(places))
    count = check_cohort(question, *(places.stage(task, name) for name in ("cohort", "split", "check")))
    click.echo(f"{task}: {count} expectations met; see {places.stage(task, 'check') / 'docs' / 'index.html'}")


@training.command()
@task_option
@click.option(
    "--subjects", type=click.IntRange(1), default=200, show_default=True, help="New subjects a site."
)
@click.option(
    "--change-at",
    type=click.IntRange(0),
    default=110,
    show_default=True,
    help="The case from which the changing site's scanner is another one.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write."
)
def traffic(task: str, subjects: int, change_at: int, out: Path) -> None:
    """Make images of new subjects of every site, to send to the service."""
    from training.traffic import make_traffic

    places = read_places()
    make_traffic(read_params(places).task(task), read_sites(places), subjects, change_at, out)
    click.echo(f"{task}: traffic written to {out}")


@training.command()
@task_option
def fit(task: str) -> None:
    """Find weights, reproducibly, and keep the best epoch on validation."""
    from training.fitting import fit as find_weights

    places = read_places()
    history = find_weights(places, task, read_params(places).task(task))
    best = min(history["epochs"], key=lambda epoch: float(epoch["validation_loss"]))
    click.echo(f"{task}: {history['parameters']} weights, best validation loss {best['validation_loss']:.4f}")


@training.command()
@task_option
def calibrate(task: str) -> None:
    """Freeze temperature and operating point on internal validation."""
    from training.calibration import calibrate as freeze

    places = read_places()
    told = freeze(places, task, read_params(places).task(task))
    click.echo(f"{task}: temperature {told['temperature']}, threshold {told['threshold']:.3f}")


@training.command()
@task_option
def package(task: str) -> None:
    """Export weights, graphs, contract, golden cases and reference as one package."""
    from training.exporting import export

    places = read_places()
    click.echo(f"{task}: {export(places, task, read_params(places).task(task))}")


@training.command()
@task_option
def evaluate(task: str) -> None:
    """Score the packaged engine on the locked test and external sets."""
    from training.evaluation import evaluate as score

    places = read_places()
    body = score(places, task, read_params(places).task(task))
    columns = list(body["overall"])
    rows = [[site, *(f"{told[name]['estimate']:.3f} [{told[name]['low']:.3f} {told[name]['high']:.3f}]"
                     for name in columns)]
            for site, told in {"overall": body["overall"], **body["sites"]}.items()]  # fmt: skip
    print_table(f"{task} on its locked sets", ["site", *columns], rows)
