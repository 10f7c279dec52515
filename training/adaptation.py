"""A model at sites that it never saw: as it is, with its threshold set anew, or its weights too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from imaging.config import Places, read_params, read_sites
from imaging.errors import ConfigError
from imaging.manifest import read_manifest
from imaging.recipe import TaskSection
from imaging.vocabulary import Kind, SiteKind, Split
from training.datasets import Dataset, load_rows
from training.runs import Run, answer, freeze, reopen
from training.splitting import choose_local
from training.study import Claim, Row, Show, Study, Variant

RATE, EPOCHS, BATCH = 0.1, 10, 16  # share of the recipe's learning rate; of local images
_SIDES = (Split.TRAIN, Split.VALIDATION)


def adapt(run: Run) -> Any:
    """Answers of a run's network, as it was and adapted to each external site, to images that it never saw.

    Local subjects are the first of a site by their hash, so that more of them include fewer; those that not
    even the largest count takes are the test, and so are the internal ones: who gains here may lose there.
    Fine-tuning goes on from the run's weights for ten epochs at a tenth of its rate, on three of four local
    subjects; the fourth chooses the epoch, the temperature and the threshold.

    Returns:
        A row an image and variant, as `training.runs.answer` gives them; `variant` ends in "SITE as it was",
        "SITE recalibrated on 25" or "SITE fine-tuned on 25".
    """
    import pandas as pd

    table = read_manifest(run.cohort.parent / "split" / "manifest.parquet")
    sites = sorted(table.loc[table["split"] == str(Split.EXTERNAL), "site"].unique())
    return pd.concat([part for site in sites for part in _adapt_to(run, table, site)], ignore_index=True)


def _adapt_to(run: Run, table: Any, site: str) -> Iterator[Any]:
    from safetensors.torch import load_file

    from training.fitting import find_weights

    subjects = sorted(table.loc[table["site"] == site, "subject"].unique())
    counts = [count for count in run.local if count < 0.8 * len(subjects)]
    taken = choose_local(subjects, max(counts, default=0), run.split)
    here = (table["site"] == site) & ~table["subject"].isin(taken)
    rows = table[(table["split"] == str(Split.TEST)) | here]
    locked = load_rows(run.cohort, run.section, rows.reset_index(drop=True))
    _, network, notes = reopen(run)
    yield answer(run, network, locked, notes).assign(variant=f"{site} as it was")
    for count in counts:
        local = choose_local(subjects, count, run.split)
        every, train, validation = (_load(run, table, local, side) for side in (None, *_SIDES))
        frozen = freeze(run.section, network, every)
        yield answer(run, network, locked, frozen).assign(variant=f"{site} recalibrated on {count}")
        weights = load_file(run.folder / "weights.safetensors")
        found = find_weights(
            (train, validation), _gently(run.section, len(train.images)), None, None, weights
        )
        tuned = reopen(run)[1]
        tuned.load_state_dict(found.weights)
        frozen = freeze(run.section, tuned.eval(), validation)
        yield answer(run, tuned, locked, frozen).assign(variant=f"{site} fine-tuned on {count}")


def plan_adaptation(places: Places, task: str, counts: tuple[int, ...], seeds: tuple[int, ...]) -> Study:
    """A study of one claim, `new-site`: what local subjects of each external site are worth.

    Raises:
        ConfigError: sites.yaml has no external site.
    """
    section, sites = read_params(places).task(task), read_sites(places).names(SiteKind.EXTERNAL)
    if not sites:
        raise ConfigError(
            "sites.yaml has no external site.", "Keep one site `external`, or see `split.left_out`."
        )
    show: Show = "dice" if section.kind is Kind.SEGMENTATION else "auc"
    labelled = section.kind is Kind.CLASSIFICATION
    ways = [f"{way} on {count}" for way in ("recalibrated", "fine-tuned") for count in counts]
    pairs = [(f"recipe: {site} {way}", f"recipe: {site} as it was", site) for site in sites for way in ways]
    rows = [
        Row(show=asked, of=of, against=against, where=where)
        for of, against, site in pairs
        for where in (site, "test")
        for asked in ((show, "accuracy") if labelled else (show,))
    ]
    claim = Claim(
        sentence=f"{task} at a new site", task=task, control="the same network as it was",
        variants={"recipe": Variant()}, rows=tuple(rows), local=counts,
    )  # fmt: skip
    return Study(seeds=seeds, claims={"new-site": claim})


def _load(run: Run, table: Any, local: dict[str, Split], side: Split | None) -> Dataset:
    chosen = [subject for subject, own in local.items() if side in (None, own)]
    rows = table[table["subject"].isin(chosen)].reset_index(drop=True)
    return load_rows(run.cohort, run.section, rows)


def _gently(section: TaskSection, images: int) -> TaskSection:
    """The recipe with a tenth of its rate and a batch that so few images fill."""
    told = {
        "learning_rate": RATE * section.fit.learning_rate, "epochs": EPOCHS, "schedule": "cosine",
        "batch_size": int(np.clip(images // 2, 2, BATCH)), "patience": 0,
    }  # fmt: skip
    return section.model_copy(update={"fit": section.fit.model_copy(update=told)})


def leave_sites_out(places: Places, task: str, seeds: tuple[int, ...]) -> Study:
    """A study of one claim, `sites`: how a task's recipe answers at sites that it never saw.

    Raises:
        ConfigError: fewer than two internal sites, so that none would be left to learn from.
    """
    sites, section = read_sites(places).names(SiteKind.INTERNAL), read_params(places).task(task)
    if len(sites) < 2:
        raise ConfigError(f"sites.yaml has {len(sites)} internal sites.", "Leave-one-site-out needs two.")
    show: Show = "dice" if section.kind is Kind.SEGMENTATION else "auc"
    without = {f"without {site}": Variant(leave_out=site) for site in sites}
    rows = [Row(show=show, of=name, where=variant.leave_out or "") for name, variant in without.items()]
    gaps = [Row(show=show, of="all sites", against=row.of, where=row.where) for row in rows]
    ends = [Row(show=show, of="all sites", where=place) for place in ("test", "external")]
    claim = Claim(
        sentence=f"{task} at sites it never saw", task=task, control="the same recipe on all sites",
        variants={"all sites": Variant(), **without},
        rows=(*ends, *rows, *gaps, Row(show="new site", of="all sites", where="one more")),
    )  # fmt: skip
    return Study(seeds=seeds, claims={"sites": claim})
