"""One side a subject: train, validation or test at internal sites, external at the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imaging.errors import ConfigError
from imaging.manifest import read_manifest
from imaging.recipe import SplitSection
from imaging.vocabulary import SiteKind, Split
from training.cohorts.cases import stable_hash

INSIDE = SiteKind.INTERNAL
VALIDATED = 4  # of the local subjects of an external site every fourth is validation, not training


def choose_split(subject: str, kind: SiteKind, section: SplitSection) -> Split:
    """The split of a subject, from its name and the seed alone: new subjects move nobody.

    Args:
        subject: the id in the manifest.
        kind: of its site; nothing of an external site is trained on, but for `split.local`.
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


def choose_local(subjects: list[str], count: int, section: SplitSection) -> dict[str, Split]:
    """The first `count` subjects of an external site by their hash, which train and validate there.

    More subjects keep those of fewer, so that a curve over counts adds and never exchanges.
    """
    ranked = sorted(set(subjects), key=lambda subject: stable_hash(section.seed, "local", subject))
    return {
        subject: Split.TRAIN if (number + 1) % VALIDATED else Split.VALIDATION
        for number, subject in enumerate(ranked[:count])
    }


def split_table(section: SplitSection, table: Any) -> Any:
    """A manifest with the column `split`: an import's own, or one drawn by subject.

    Args:
        section: seed, shares, sites left out, and local subjects of external sites.
        table: the manifest, a DataFrame.

    Raises:
        ConfigError: a site is not in the cohort, or has no subjects left over.
    """
    table = table.copy()
    given = table.pop("given_split") if "given_split" in table else [None] * len(table)
    local: dict[str, Split] = {}
    for site, count in section.local.items():
        subjects = list(table.loc[table["site"] == site, "subject"].unique())
        if count >= len(subjects):
            raise ConfigError(
                f"split.local takes {count} subjects of {site}, which has {len(subjects)}.",
                "Take fewer: those that are left over are the test.",
            )
        local |= choose_local(subjects, count, section)
    unknown = set(section.left_out) - set(table["site"])
    if unknown:
        raise ConfigError(f"split.left_out names {sorted(unknown)}.", "Name sites of the cohort.")
    external = table["site"].isin(section.left_out) | (table["site_kind"] == SiteKind.EXTERNAL)
    facts = zip(table["subject"], external, given, strict=True)
    table["split"] = [
        str(
            local.get(subject)
            or (Split.EXTERNAL if outside else told)
            or choose_split(subject, INSIDE, section)
        )
        for subject, outside, told in facts
    ]
    return table


def split_cohort(section: SplitSection, cohort: Path, folder: Path) -> dict[str, int]:
    """Write the cohort's manifest again, with the column `split`.

    Args:
        section: as of `split_table`.
        cohort: folder of the cohort stage.
        folder: what is written to; made if need be.

    Returns:
        Number of subjects of each split.
    """
    table = split_table(section, read_manifest(cohort / "manifest.parquet"))
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "manifest.parquet", index=False)
    return {split.value: int(table.loc[table["split"] == split, "subject"].nunique()) for split in Split}
