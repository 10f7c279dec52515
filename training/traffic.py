"""Images of people whom no cohort knows, as a service meets them; one site's scanner changes on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from imaging.config import Sites, TaskSection
from training.cohorts.building import Order, check_sites, load_builder, make_cases, subject_name
from training.cohorts.cases import Case

FIRST_SUBJECT = 100_000  # beyond every cohort's numbers
IMAGES, MASKS, TABLE = "traffic.npy", "masks.npy", "traffic.parquet"


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

    builder = load_builder(section.cohort.builder)
    check_sites(builder, section.cohort.builder, sites)
    orders = [
        Order(site, FIRST_SUBJECT + number, 0, site == builder.CHANGED_SITE and number >= change_at)
        for number in range(subjects)
        for site in sites.names()
    ]
    cases = list(make_cases(section.cohort.builder, section.cohort.seed, orders))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / IMAGES, np.stack([case.pixels for case in cases]))
    np.save(folder / MASKS, np.stack([case.mask for case in cases]))
    rows = [{"row": row} | _describe(*pair) for row, pair in enumerate(zip(orders, cases, strict=True))]
    pd.DataFrame(rows).to_parquet(folder / TABLE, index=False)


def _describe(order: Order, case: Case) -> dict[str, Any]:
    """What the table says of one image."""
    return {
        "site": order.site,
        "subject": subject_name(order),
        "scanner": case.scanner,
        "acquired": case.acquired,
        "spacing_mm": case.spacing_mm,
        "label": case.label,
        "changed": order.changed,
    }
