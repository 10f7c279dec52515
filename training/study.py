"""The study: what the review claims, which runs put it to the test, and how they are made and gathered."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from imaging.config import Places, explain, read_params, read_yaml, suggest
from imaging.errors import ConfigError, DataError
from imaging.manifest import digest_file
from imaging.recipe import ExplanationSection, FitSection, RobustnessSection, Section
from training.checkpoints import CODE
from training.fitting import ADMITTED
from training.runs import Run, count_cores, perform

LEARNT_FROM = ("fit", "preparation", "kind", "classes", "calibrate")
DECISIONS = Path("training/pipelines/study/params.yaml")
CODE_HERE = ("training/corruption.py", "training/explanation.py", "training/calibration.py",
             "training/runs.py", "training/splitting.py", "training/adaptation.py", "training/datasets.py",
             "imaging/scores.py", "imaging/preparation.py")  # fmt: skip


Show = Literal["accuracy", "sensitivity", "specificity", "share of negatives", "auc", "fall of auc",
               "dice", "hits", "energy", "hits of random weights", "drop", "drop saved", "seconds saved",
               "new site"]  # fmt: skip


class Variant(Section):
    """A recipe that differs from the task's.

    Attributes:
        fit: laid over the task's section `fit`, key by key.
        subjects: share of the training subjects; smaller shares lie within larger ones.
        leave_out: a site whose subjects are neither trained nor validated on.
    """

    fit: dict[str, Any] = Field(default_factory=dict)
    subjects: float = Field(default=1.0, gt=0, le=1)
    leave_out: str | None = None


class Row(Section):
    """A number that the study shows; where it asks for something, one that decides.

    Attributes:
        show: what is estimated, see `training.claims`.
        of: a variant or an ensemble.
        against: the control; the number is then the difference, or the share saved.
        where: a split, a site, or a group of corruptions (`seen`, `held out`).
        above: where the whole interval must lie.
        target: validation score that `seconds saved` waits for.
    """

    show: Show
    of: str
    against: str | None = None
    where: str = "test"
    above: float | None = None
    target: float | None = None


class Untestable(Section):
    """A sentence of the review that cannot be tested here, and why."""

    sentence: str
    why: str


class Claim(Section):
    """A sentence of the review, and how it is put to the test.

    Attributes:
        sentence: of the review.
        task: of params.yaml.
        control: what it is compared with, in words.
        variants: recipes by name.
        ensembles: name -> variants whose calibrated probabilities are averaged, see `add_ensembles`.
        rows: what is shown.
        needs: whether all rows with `above` must hold, or any (each interval is then widened: Bonferroni).
        plot: how the rows are drawn.
        corruption: under which the test set is answered too.
        maps: how many heat maps are held against lesion masks.
        local: so many subjects of external sites adapt every network, see `training.adaptation`.
        untestable: what else the review says of it.
    """

    sentence: str
    task: str
    control: str
    variants: dict[str, Variant] = Field(min_length=1)
    ensembles: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    rows: tuple[Row, ...] = Field(min_length=1)
    needs: Literal["all", "any"] = "all"
    plot: Literal["forest", "course", "growth"] = "forest"
    corruption: RobustnessSection = RobustnessSection()
    maps: ExplanationSection = ExplanationSection()
    local: tuple[int, ...] = ()
    untestable: tuple[Untestable, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> Self:
        named = {each for row in self.rows for each in (row.of, row.against or row.of)}
        unknown = {each for members in self.ensembles.values() for each in members} - set(self.variants)
        unknown |= {each.partition(":")[0] for each in named} - set(self.variants) - set(self.ensembles)
        if unknown:
            raise ValueError(f"no variant or ensemble {', '.join(sorted(unknown))}")
        return self


class Study(Section):
    """The whole study.

    Attributes:
        fit: task -> what is laid over its recipe for all variants.
        processes: runs at a time, one thread each; one a core unless told.
    """

    seeds: tuple[int, ...] = Field(min_length=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    fit: dict[str, dict[str, Any]] = Field(default_factory=dict)
    processes: int | None = Field(default=None, ge=1)
    claims: dict[str, Claim]

    def claim(self, name: str) -> Claim:
        """A claim by name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.claims:
            raise ConfigError(f"The study has no claim {name[:60]!r}.", suggest(name, self.claims, "Claims"))
        return self.claims[name]


def read_study(places: Places) -> Study:
    """The decisions beside the study's pipeline."""
    return read_yaml(places.root / DECISIONS, Study)


def claim_folder(places: Places, name: str) -> Path:
    """Where a claim's answers lie."""
    return places.build / "study" / "claims" / name


def run_claim(places: Places, study: Study, name: str, folder: Path) -> None:
    """Make the runs of a claim that are not there yet, and gather what they answered.

    Args:
        places: where the cohort and the runs lie.
        study: with the claim.
        name: of the claim.
        folder: what is written to: answers.parquet (a row an image, run and corruption) and runs.json.

    Raises:
        ConfigError: no such claim, task or architecture.
        DataError: the cohort is not built, a network learnt nothing, or a run was killed.
    """
    from rich.console import Console
    from rich.progress import track

    runs = plan_runs(places, study, study.claim(name))
    waiting = {run.folder: run for run in runs.values() if run.missing()}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started here
    pool = ProcessPoolExecutor(
        study.processes or count_cores(), multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )
    try:
        done = as_completed([pool.submit(perform, run) for run in waiting.values()])
        for finished in track(done, f"study {name}: runs", len(waiting), console=Console(stderr=True)):
            finished.result()
    except BrokenProcessPool as error:
        raise DataError(f"A run of {name} was killed.", "Run it again: finished runs are kept.") from error
    finally:
        pool.shutdown(cancel_futures=True)
    cohort = places.stage(study.claim(name).task, "cohort") / "cohort.yaml"
    _gather(study.claim(name), runs, yaml.safe_load(cohort.read_text()), folder)


def plan_runs(places: Places, study: Study, claim: Claim) -> dict[tuple[str, int], Run]:
    """A run for each variant and seed, seed by seed, so that what else the machine does meets all variants.

    A run lies in build/study/runs/<digest of all that it depends on>, which no stage calls its output: a
    study that was killed goes on where it was, and claims share runs.
    """
    task, root, runs = read_params(places).task(claim.task), Path(__file__).parents[1], {}
    paths = [path for name in (*CODE, *CODE_HERE) for path in sorted(root.glob(name)) if path.is_file()]
    facts = [version("torch"), _digest(places.stage(claim.task, "split") / "manifest.parquet")]
    facts += [digest_file(path) for path in paths]
    common = study.fit.get(claim.task, {})
    for seed in study.seeds:
        for name, variant in claim.variants.items():
            section = task.model_copy(
                update={"fit": _patch(task.fit, [common, variant.fit, {"seed": seed}], name)}
            )
            borrowed = section.fit.architecture.pretrained
            parts = [section.model_dump(mode="json", include=set(LEARNT_FROM)), variant.subjects,
                     variant.leave_out, borrowed and _digest(places.root / borrowed), *facts]  # fmt: skip
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
            runs[name, seed] = Run(
                folder=places.build / "study" / "runs" / digest, cohort=places.stage(claim.task, "cohort"),
                section=section, share=variant.subjects, leave_out=variant.leave_out,
                corruption=claim.corruption, maps=claim.maps, split=task.split, local=claim.local,
            )  # fmt: skip
    return runs


def _digest(path: Path) -> str:
    if not path.exists():
        raise DataError(f"There is no {path}.", "Run `make study`, which builds what the study needs.")
    return digest_file(path)


def _patch(fit: FitSection, patches: list[dict[str, Any]], name: str) -> FitSection:
    try:
        return FitSection.model_validate(reduce(_lay_over, patches, fit.model_dump(mode="json")))
    except ValidationError as error:
        raise ConfigError(f"Variant {name!r}: {explain(error, FitSection)}.", "Mend its `fit`.") from error


def _lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: _lay_over(below.get(key, {}), part) for key, part in above.items() if isinstance(part, dict)}
    return {**below, **above, **both}


def _gather(claim: Claim, runs: dict[tuple[str, int], Run], cohort: dict[str, Any], folder: Path) -> None:
    import pandas as pd

    tables, notes = [], []
    for (variant, seed), run in runs.items():
        for part in map(pd.read_parquet, run.files().values()):
            adapted = variant + ": " + part["variant"] if "variant" in part else variant
            tables.append(part.assign(variant=adapted, seed=seed))
        notes.append({"variant": variant, "seed": seed, **json.loads(run.notes.read_text())})
    folder.mkdir(parents=True, exist_ok=True)
    answers = add_ensembles(claim, notes, pd.concat(tables, ignore_index=True))
    answers.to_parquet(folder / "answers.parquet", index=False)
    (folder / "runs.json").write_text(json.dumps({"cohort": cohort, "runs": notes}, indent=1) + "\n")


def add_ensembles(claim: Claim, runs: list[dict[str, Any]], table: Any) -> Any:
    """Answers of ensembles as if they were variants; validation alone has a say in who is in them.

    NAME: the mean of the members whose validation loss is within `ADMITTED` of the best one's, seed by seed;
    absent where a seed admits one alone. NAME: best member: that one. NAME: all members: the mean of them
    all. NAME: one architecture: the mean over seeds of the best member of them all.
    """
    import pandas as pd

    loss = {(run["variant"], run["seed"]): min(e["validation_loss"] for e in run["epochs"]) for run in runs}
    seeds, tables = sorted({seed for _, seed in loss}), [table]
    for name, members in claim.ensembles.items():
        near = {}
        for seed in seeds:
            own = {member: loss[member, seed] for member in members}
            near[seed] = [member for member in members if own[member] <= ADMITTED * min(own.values())]
            for called, who in (("best member", [min(own, key=own.__getitem__)]), ("all members", members)):
                tables.append(_average(table, who, [seed]).assign(variant=f"{name}: {called}", seed=seed))
        if min(map(len, near.values())) > 1:
            tables += [_average(table, who, [n]).assign(variant=name, seed=n) for n, who in near.items()]
        whole = min(members, key=lambda member: sum(loss[member, seed] for seed in seeds))
        same = _average(table, [whole], seeds)
        tables += [same.assign(variant=f"{name}: one architecture", seed=seed) for seed in seeds]
    return pd.concat(tables, ignore_index=True)


def _average(table: Any, members: Sequence[str], seeds: list[int]) -> Any:
    clean = table[table["variant"].isin(members) & table["seed"].isin(seeds) & (table["family"] == "")]
    facts = ["image", "subject", "site", "split", "truth", "family"]
    return clean[clean["score"].notna()].groupby(facts, as_index=False, dropna=False)["score"].mean()
