"""The expectations of a cohort, as data: each has a sentence, which is its name in every report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imaging.config import Sites, TaskSection
from imaging.manifest import COLUMNS
from imaging.vocabulary import AgeBand, Kind, Sex, SiteKind, Split

STORED_TYPES = ("uint8", "uint16", "int16", "float32")


@dataclass(frozen=True)
class Question:
    """Which task is checked, and where its images may come from."""

    task: str
    section: TaskSection
    sites: Sites


@dataclass(frozen=True)
class Rule:
    """One expectation.

    Attributes:
        sentence: what holds, in words: its name in every report.
        kind, options: the class in great_expectations.expectations, and its arguments.
    """

    sentence: str
    kind: str
    options: dict[str, Any]


def manifest_rules(question: Question) -> list[Rule]:
    """The manifest: exactly the listed columns, closed vocabularies, nothing missing."""
    section, check = question.section, question.section.check
    labels = [0, 1] if section.kind is Kind.CLASSIFICATION else []
    allowed: dict[str, list[Any]] = {
        "split": list(Split),
        "site": question.sites.names(),
        "site_kind": list(SiteKind),
        "age_band": list(AgeBand),
        "sex": list(Sex),
        "modality": [section.modality],
        "redistributable": [True, False],
        "simulated": [True, False],
    }
    filled = [name for name in (*COLUMNS, "split") if name != "label" or labels]
    return [
        Rule("the columns are the listed ones and no other", "ExpectTableColumnsToMatchSet",
             {"column_set": [*COLUMNS, "split"], "exact_match": True}),
        Rule("no two images have the same pixels", "ExpectColumnValuesToBeUnique", {"column": "sha256"}),
        Rule("acquired is a day", "ExpectColumnValuesToMatchStrftimeFormat",
             {"column": "acquired", "strftime_format": "%Y-%m-%d"}),
        _between("spacing_mm is in range", "spacing_mm", check.spacing_low_mm, check.spacing_high_mm),
        *(_in_set(f"{column} is in its vocabulary", column, values) for column, values in allowed.items()),
        _in_set("label is a class", "label", labels) if labels else
        Rule("the mask is the only truth", "ExpectColumnValuesToBeNull", {"column": "label"}),
        *(_filled(name) for name in filled),
    ]  # fmt: skip


def pixel_rules(question: Question) -> list[Rule]:
    """The pixels and masks behind each row, as measured: what they were when built, and possible."""
    check, highest = question.section.check, len(question.section.classes) - 1
    return [
        _true("the pixels are those of the sha256", "digest_holds"),
        _true("every pixel is a finite number", "finite"),
        _between("no pixel is below the range", "lowest", check.pixel_low, check.pixel_high),
        _between("no pixel is above the range", "highest", check.pixel_low, check.pixel_high),
        _in_set("pixels are stored in a known type", "type", list(STORED_TYPES)),
        _single("all images have one type", "type"),
        _single("all images have one shape", "shape"),
        _true("every image has a mask of its shape", "mask_fits"),
        _between("mask labels are classes", "mask_highest", 0, highest),
        _true("the label agrees with the mask", "mask_agrees"),
        _between("no pixels are in two splits", "splits", 1, 1),
    ]


def subject_rules() -> list[Rule]:
    """Subjects: one side each."""
    return [
        _between("a subject is in one split", "splits", 1, 1),
        _between("a subject is of one site", "sites", 1, 1),
        _between("a subject has one sex", "sexes", 1, 1),
        _true("site_kind is that of sites.yaml", "kind_holds"),
        _true("external sites are in the external split and internal ones never", "side_holds"),
    ]


def stratum_rules(question: Question) -> list[Rule]:
    """Splits and sites: subjects enough, and every class; in validation, of all sites together."""
    internal, external = (len(question.sites.names(kind)) for kind in (SiteKind.INTERNAL, SiteKind.EXTERNAL))
    least, classes = question.section.check.subjects_per_split_and_site, len(question.section.classes)
    return [
        Rule(
            "every site is in each of its splits",
            "ExpectTableRowCountToEqual",
            {"value": 3 * internal + external},
        ),
        _between("every split of a site has subjects enough", "subjects", least, None),
        _between("every split has every class", "classes", classes, classes),
    ]


def _between(sentence: str, column: str, low: float, high: float | None) -> Rule:
    options = {"column": column, "min_value": low, "max_value": high}
    return Rule(sentence, "ExpectColumnValuesToBeBetween", options)


def _in_set(sentence: str, column: str, values: list[Any]) -> Rule:
    plain = [str(value) if isinstance(value, str) else value for value in values]  # JSON knows no StrEnum
    return Rule(sentence, "ExpectColumnValuesToBeInSet", {"column": column, "value_set": plain})


def _filled(column: str) -> Rule:
    return Rule(f"{column} is never empty", "ExpectColumnValuesToNotBeNull", {"column": column})


def _true(sentence: str, column: str) -> Rule:
    return _in_set(sentence, column, [True])


def _single(sentence: str, column: str) -> Rule:
    return Rule(
        sentence,
        "ExpectColumnUniqueValueCountToBeBetween",
        {"column": column, "min_value": 1, "max_value": 1},
    )
