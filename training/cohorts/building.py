"""From a builder's cases to a cohort on disk (shards, manifest, facts), and to a service's traffic."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from imaging.config import Sites
from imaging.errors import ConfigError
from imaging.manifest import digest_pixels, write_manifest
from imaging.recipe import Profile, TaskSection
from imaging.vocabulary import SiteKind
from training.cohorts.cases import Case

IMAGES, MASKS = "images.npy", "masks.npy"
FIRST_SUBJECT = 100_000  # of traffic: beyond every cohort's numbers
VERSION = "1"
BUILDERS = Path("training/cohorts")
ALONE = 32  # cases that are made sooner by this process than by a pool that must start first


@dataclass(frozen=True)
class Order:
    """Which case to make; `changed` takes the builder's changed scanner instead of the site's own."""

    site: str
    subject: int
    view: int
    changed: bool = False


def load_builder(source: str) -> Any:
    """The module of a builder: training/cohorts/<name>.py.

    Raises:
        ConfigError: there is none.
    """
    path = Path(source)
    module = f"training.cohorts.{path.stem}"
    if path.parent != BUILDERS or path.suffix != ".py" or find_spec(module) is None:
        raise ConfigError(
            f"There is no cohort builder {source!r}.",
            f"Write {BUILDERS}/<name>.py and name it in cohort.source, or name the folder of an import.",
        )
    return importlib.import_module(module)


def make_case(source: str, seed: int, order: Order) -> Case:
    """Make one case, here and now."""
    module = load_builder(source)
    profile = module.CHANGED_SCANNER if order.changed else None
    case: Case = module.make_case(seed, order.site, order.subject, order.view, profile)
    return case


def make_cases(source: str, seed: int, orders: list[Order], processes: int | None = None) -> Iterator[Case]:
    """Make cases in the order asked for; the same bytes whatever the number of processes.

    Args:
        source: path of the builder.
        seed: of the cohort.
        orders: which cases.
        processes: how many at once, one thread each; one a core unless told.
    """
    from rich.console import Console
    from rich.progress import track

    make, console = partial(make_case, source, seed), Console(stderr=True)
    show = partial(track, total=len(orders), description=f"{Path(source).stem}: images", console=console)
    processes = processes or (os.cpu_count() or 1 if len(orders) > ALONE else 1)
    if processes == 1:
        yield from show(map(make, orders))
        return
    with _one_thread_each(), ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from show(pool.map(make, orders, chunksize=16))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started meanwhile use one thread: threads times processes must not exceed the cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def build_cohort(task: str, section: TaskSection, profile: Profile, sites: Sites, folder: Path) -> None:
    """Write images.npy, masks.npy, manifest.parquet and cohort.yaml, the same bytes every time.

    Args:
        task: name of the task.
        section: its section of params.yaml.
        profile: how many subjects and views.
        sites: where the subjects are.
        folder: what is written to; made if need be.

    Raises:
        ConfigError: the builder is missing, or does not know a site.
    """
    builder, seed = load_builder(section.cohort.source), section.cohort.seed
    check_sites(builder, section.cohort.source, sites)
    orders = [
        Order(site, subject, view)
        for site in sites.names()
        for subject in range(
            profile.internal if sites.site(site).kind is SiteKind.INTERNAL else profile.external
        )
        for view in range(profile.views)
    ]
    cases = list(make_cases(section.cohort.source, seed, orders))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / IMAGES, np.stack([case.pixels for case in cases]))
    np.save(folder / MASKS, np.stack([case.mask for case in cases]))
    facts = _row_facts(section, builder)
    rows = [
        facts | _describe(case, order, sites) | {"row": number}
        for number, (case, order) in enumerate(zip(cases, orders, strict=True))
    ]
    write_manifest(rows, folder / "manifest.parquet")
    cohort = _cohort_facts(task, section, profile, builder) | {"images": len(rows)}
    (folder / "cohort.yaml").write_text(
        yaml.safe_dump(cohort, sort_keys=False, allow_unicode=True, width=100)
    )


def check_sites(builder: Any, source: str, sites: Sites) -> None:
    """Refuse sites that the builder has no acquisition profile for.

    Raises:
        ConfigError: names them.
    """
    unknown = [site for site in sites.names() if site not in builder.SITES]
    if unknown:
        raise ConfigError(
            f"The builder {source!r} has no acquisition profile for {', '.join(unknown)}.",
            f"Add it to SITES in {source}, or mend sites.yaml.",
        )


def subject_name(order: Order) -> str:
    """The id of a subject, e.g. north-0001."""
    return f"{order.site}-{order.subject:04d}"


def _describe(case: Case, order: Order, sites: Sites) -> dict[str, Any]:
    """What a manifest row says of one case."""
    return {
        "sha256": digest_pixels(case.pixels),
        "subject": subject_name(order),
        "site": order.site,
        "site_kind": sites.site(order.site).kind.value,
        "scanner": case.scanner,
        "acquired": case.acquired,
        "age_band": case.person.age_band.value,
        "sex": case.person.sex.value,
        "spacing_mm": case.spacing_mm,
        "label": case.label,
    }


def _row_facts(section: TaskSection, builder: Any) -> dict[str, Any]:
    """What all rows of a cohort share."""
    return {
        "image": IMAGES,
        "mask": MASKS,
        "modality": section.modality.value,
        "licence": builder.LICENCE,
        "redistributable": True,
        "simulated": True,
    }


def _cohort_facts(task: str, section: TaskSection, profile: Profile, builder: Any) -> dict[str, Any]:
    """What cohort.yaml says."""
    return {
        "name": Path(section.cohort.source).stem.replace("_", "-"),
        "version": VERSION,
        "task": task,
        "modality": section.modality.value,
        "classes": list(section.classes),
        "shape": list(builder.SHAPE),
        "spacing_mm": builder.SPACING_MM,
        "licence": builder.LICENCE,
        "source": builder.SOURCE,
        "simulated": True,
        "simulation": builder.SIMULATED,
        "limits": list(getattr(builder, "LIMITS", ())),
        "subject_split": True,
        "generator": section.cohort.source,
        "profile": section.cohort.profile,
        "subjects": profile.model_dump(),
        "seed": section.cohort.seed,
    }


def make_traffic(section: TaskSection, sites: Sites, subjects: int, change_at: int, folder: Path) -> None:
    """Write traffic.npy (n, rows, columns), masks.npy and traffic.parquet, in the order of sending.

    Sites take turns. The table has row, site, subject, scanner, acquired, spacing_mm, label (null where the
    mask is the truth) and changed.

    Args:
        section: the task; its cohort's builder and seed are used.
        sites: all send.
        subjects: new subjects a site, one image each.
        change_at: number of the case from which the changing site (CHANGED_SITE of the builder) uses its
            builder's CHANGED_SCANNER; `subjects` or more for never.
        folder: what is written to; made if need be.

    Raises:
        ConfigError: the builder is missing, or does not know a site.
    """
    import pandas as pd

    builder = load_builder(section.cohort.source)
    check_sites(builder, section.cohort.source, sites)
    orders = [
        Order(site, FIRST_SUBJECT + number, 0, site == builder.CHANGED_SITE and number >= change_at)
        for number in range(subjects)
        for site in sites.names()
    ]
    cases = list(make_cases(section.cohort.source, section.cohort.seed, orders))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "traffic.npy", np.stack([case.pixels for case in cases]))
    np.save(folder / MASKS, np.stack([case.mask for case in cases]))
    kept = ("site", "subject", "scanner", "acquired", "spacing_mm", "label")
    told = [_describe(case, order, sites) for case, order in zip(cases, orders, strict=True)]
    rows = [
        {"row": row, **{name: facts[name] for name in kept}, "changed": orders[row].changed}
        for row, facts in enumerate(told)
    ]
    pd.DataFrame(rows).to_parquet(folder / "traffic.parquet", index=False)
