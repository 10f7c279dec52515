"""One side a subject: train, validation or test at internal sites, external at the others."""

from __future__ import annotations

from pathlib import Path

from imaging.config import SplitSection
from imaging.manifest import read_manifest
from imaging.vocabulary import SiteKind, Split
from training.cohorts.cases import stable_hash


def choose_split(subject: str, kind: SiteKind, section: SplitSection) -> Split:
    """The split of a subject, from its name and the seed alone: new subjects move nobody.

    Args:
        subject: the id in the manifest.
        kind: of its site; nothing of an external site is ever trained on.
        section: seed and shares.

    Returns:
        The same split in every process and on every machine.
    """
    if kind is SiteKind.EXTERNAL:
        return Split.EXTERNAL
    place = stable_hash(section.seed, subject) / 2**64
    if place < section.train:
        return Split.TRAIN
    return Split.VALIDATION if place < section.train + section.validation else Split.TEST


def split_cohort(section: SplitSection, cohort: Path, folder: Path) -> dict[str, int]:
    """Write the cohort's manifest again, with the column `split`.

    Args:
        section: seed and shares.
        cohort: folder of the cohort stage.
        folder: what is written to; made if need be.

    Returns:
        Number of subjects of each split.
    """
    table = read_manifest(cohort / "manifest.parquet")
    table["split"] = [
        choose_split(subject, SiteKind(kind), section).value
        for subject, kind in zip(table["subject"], table["site_kind"], strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "manifest.parquet", index=False)
    return {split.value: int(table.loc[table["split"] == split, "subject"].nunique()) for split in Split}
