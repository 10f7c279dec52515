"""The click face of training: read config, call the function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from pydantic_core import PydanticUndefined

from imaging.config import read_params, read_places, read_sites
from imaging.intervals import Estimate
from imaging.terminal import print_table
from training.items import Wish

PLAIN = (None, False, (), PydanticUndefined)
task_option = click.option("--task", required=True, help="The task: a section of params.yaml.")


@click.group()
def training() -> None:
    """From cohort to model package, stage by stage."""


@training.command()
@task_option
def cohort(task: str) -> None:
    """Build the task's images, masks and manifest, or take them from an import."""
    from training.cohorts.building import build_cohort

    places, params = read_places(), read_params(read_places())
    section = params.task(task)
    folder = places.stage(task, "cohort")
    if section.cohort.source.endswith(".py"):
        build_cohort(task, section, params.profiles[section.cohort.profile], read_sites(places), folder)
    else:
        from training.importing import link_import

        link_import(places.root / section.cohort.source, folder)
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
    report = check_cohort(question, *(places.stage(task, name) for name in ("cohort", "split", "check")))
    for told in (*(f"warning: {warning}" for warning in report["warnings"]), *report["limits"]):
        click.echo(f"{task}: {told}")
    met = len(report["expectations"]) - len(report["warnings"])
    click.echo(f"{task}: {met} expectations met; see {places.stage(task, 'check') / 'docs' / 'index.html'}")


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
    from training.cohorts.building import make_traffic

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
@click.option("--imported", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None,
              help="A folder of `registry import`, in place of what fit and calibrate made.")  # fmt: skip
def package(task: str, imported: Path | None) -> None:
    """Export weights, graphs, contract, golden cases and reference as one package."""
    from training.exporting import export

    places = read_places()
    click.echo(f"{task}: {export(places, task, read_params(places).task(task), imported)}")


@training.command()
@task_option
def evaluate(task: str) -> None:
    """Score the packaged engine on the locked test and external sets."""
    from training.evaluation import evaluate as score

    places = read_places()
    body = score(places, task, read_params(places).task(task))
    columns = list(body["overall"])
    rows = [
        [site, *(str(Estimate.model_validate(told[name])) if name in told else "-" for name in columns)]
        for site, told in {"overall": body["overall"], **body["sites"]}.items()
    ]
    print_table(f"{task} on its locked sets", ["site", *columns], rows)


@training.command()
@task_option
@click.option(
    "--version", type=int, required=True, help="A registered version: the champion, or the first one."
)
@click.option("--identity", default=None, help="Who signs. Default: FORMULARY_IDENTITY, else your OS user.")
@click.option("--because", default="The locked sets changed.", show_default=True, help="Why.")
def rescore(task: str, version: int, identity: str | None, because: str) -> None:
    """Score a registered version on the locked sets as they are now, so that the gate can compare with it."""
    from imaging.vocabulary import Scope
    from registry.access import Acting, act
    from registry.decisions import renew_scores
    from registry.engines import open_engine
    from registry.ledger import open_ledger
    from registry.package import shelf
    from training.evaluation import score_package

    places, section = read_places(), read_params(read_places()).task(task)
    ledger, how = open_ledger(places.var), section.evaluate
    signer = act(places, ledger, identity, Scope.REGISTER)
    package = shelf(places.var, ledger.version(task, version)[0])
    engine = open_engine(package, how.engine, how.precision)
    scores, _ = score_package(places, task, section, package, engine)
    renew_scores(Acting(places, ledger, signer, because), task, version, scores)
    click.echo(f"{task} v{version} is scored on the locked sets as they are now.")


def _wish_options(command: Any) -> Any:
    """An option for each field of `Wish`, which says what it is for and checks what it is given."""
    for name, field in Wish.model_fields.items():
        about = str(field.description) + ("" if field.default in PLAIN else f" [default: {field.default}]")
        flag, needed = field.annotation is bool, name == "licence"
        option = click.option("--" + name.replace("_", "-"), is_flag=flag, required=needed, help=about)
        command = option(command)
    return command


@training.command("import")
@click.argument("format", type=click.Choice(["medmnist", "msd", "dicom", "bids", "csv", "slides"]))
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, help="Folder of the cohort, e.g. data/my-task; its name is the task's.")
@click.option("--dry-run", is_flag=True, help="Say what would be imported and refused; write nothing.")
@click.option("--skip-refused", is_flag=True, help="Leave out what is refused, and list it in refused.csv.")
@click.option("--again", is_flag=True, help="Replace a finished import, once the new one is whole.")
@_wish_options
def import_(
    format: str, source: Path, out: str, dry_run: bool, skip_refused: bool, again: bool, **options: Any
) -> None:
    """Import images: FORMAT (medmnist, msd, dicom, bids, csv, slides) from SOURCE, a file or folder.

    What cannot be taken is refused by file and row. Killed, the same command goes on where it was.
    """
    from training.importing import Order, import_cohort, make_wish

    places = read_places()
    order = Order(
        format, source, out, make_wish(format, options, read_sites(places)), again, skip_refused, dry_run
    )
    told, texts = import_cohort(order, places)
    rows = [[*key, str(count)] for key, count in sorted(told.strata.items())]
    title = f"{len(told.rows)} images of {len(told.subjects)} subjects"
    print_table(title, ["site", "split", "label", "images"], rows)
    for note, count in sorted(told.notes.items()):
        click.echo(f"{count} {note}")
    for where, why in told.refused:
        click.echo(f"refused: {where}: {why}", err=True)
    goals = {"task.yaml": "the end of params.yaml", "policy.yaml": f"registry/policies/{Path(out).name}.yaml"}
    for file, goal in goals.items() if texts else ():
        click.echo(f"\n{out}/{file}, for {goal}:\n\n{texts[file]}")
    if told.refused and dry_run:
        raise SystemExit(1)


@training.command()
@task_option
@click.option("--seed", "seeds", type=int, multiple=True, default=(1, 2, 3), show_default=True,
              help="Of a training; give it again for more of them.")  # fmt: skip
def loso(task: str, seeds: tuple[int, ...]) -> None:
    """Leave one site out: train without each internal site in turn, and answer it."""
    from training.adaptation import leave_sites_out

    _run_alone(task, leave_sites_out(read_places(), task, seeds), "loso")


@training.command()
@task_option
@click.option("--subjects", "counts", type=click.IntRange(4), multiple=True, default=(25, 50, 100),
              show_default=True, help="Local subjects; give it again for more of them.")  # fmt: skip
@click.option("--seed", "seeds", type=int, multiple=True, default=(1, 2, 3), show_default=True,
              help="Of a training; give it again for more of them.")  # fmt: skip
def adapt(task: str, counts: tuple[int, ...], seeds: tuple[int, ...]) -> None:
    """What local subjects of an external site are worth, there and elsewhere: recalibrated and fine-tuned."""
    from training.adaptation import plan_adaptation

    _run_alone(task, plan_adaptation(read_places(), task, tuple(sorted(counts)), seeds), "adapt")


def _run_alone(task: str, study: Any, stage: str) -> None:
    """Make the runs of a study's only claim, and tell its rows."""
    from training.study import run_claim
    from training.study_report import judge_stored, write_number

    (name, claim), places = next(iter(study.claims.items())), read_places()
    folder = places.stage(task, stage)
    run_claim(places, study, name, folder)
    told = judge_stored(study, name, folder)["rows"]
    (folder / f"{stage}.json").write_text(json.dumps(told, indent=1) + "\n")
    rows = [[row["what"], write_number(row), str(row.get("subjects", ""))] for row in told]
    print_table(claim.sentence, ["what", "estimate", "subjects"], rows)


@training.group()
def study() -> None:
    """Each claim of the review beside what is measured here."""


@study.command()
@click.argument("claim")
def run(claim: str) -> None:
    """Make the runs of a CLAIM (a name in training/pipelines/study/params.yaml) that are not there yet."""
    from training.study import claim_folder, read_study, run_claim

    places = read_places()
    run_claim(places, read_study(places), claim, claim_folder(places, claim))
    click.echo(f"{claim}: answers written to {claim_folder(places, claim)}")


@study.command()
@click.option("--unfinished", is_flag=True, help="Leave out claims that have not run, and say which.")
def report(unfinished: bool) -> None:
    """Judge every claim by the rule that was written down before, and write docs/study.md."""
    from training.study import read_study
    from training.study_report import report_study

    places = read_places()
    verdicts = report_study(places, read_study(places), unfinished)
    print_table("The review's claims, here", ["claim", "verdict"], [list(told) for told in verdicts.items()])


@training.command()
@click.option("--from", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A state dict (.pt, .pth or .safetensors) of torchvision, timm or MONAI.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The .safetensors to write.")
def backbone(source: Path | None, out: Path | None) -> None:
    """Convert pretrained weights to safetensors: the embedded MobileNetV2, or a file of your own."""
    from registry.backbones import convert_weights, write_backbone

    if (source is None) != (out is None):
        raise click.UsageError("--from and --out belong together.")
    if source and out:
        click.echo(convert_weights(source, out))
    else:
        click.echo(f"written to {write_backbone(read_places())}")
