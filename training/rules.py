"""The expectations of a cohort, as data: each has a sentence, which is its name in every report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from imaging.config import Sites
from imaging.manifest import COLUMNS
from imaging.recipe import TaskSection
from imaging.vocabulary import AgeBand, Kind, Severity, Sex, SiteKind, Split

STORED_TYPES = ("uint8", "uint16", "int16", "float32")


@dataclass(frozen=True)
class Question:
    """Which task is checked, and where its images may come from.

    Attributes:
        task, section: what is asked of the images.
        sites: of sites.yaml.
        subject_split: whether the cohort knows its subjects; else no rule can hold them to one split.
    """

    task: str
    section: TaskSection
    sites: Sites
    subject_split: bool = True

    @property
    def built(self) -> bool:
        """Whether a builder of this platform made the cohort, and not an import."""
        return self.section.cohort.source.endswith(".py")


@dataclass(frozen=True)
class Rule:
    """One expectation.

    Attributes:
        sentence: what holds, in words: its name in every report.
        kind, options: the class in great_expectations.expectations, and its arguments.
        severity: critical stops the stage; a warning is counted.
    """

    sentence: str
    kind: str
    options: dict[str, Any]
    severity: Severity = Severity.CRITICAL


def manifest_rules(question: Question) -> list[Rule]:
    """The manifest: exactly the listed columns, closed vocabularies, nothing missing."""
    section, check = question.section, question.section.check
    labels = list(range(len(section.classes))) if section.kind is not Kind.SEGMENTATION else []
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
    optional = {"label"} if not labels else {"mask"} if section.kind is Kind.CLASSIFICATION else set()
    filled = [name for name in (*COLUMNS, "split") if name not in optional]
    return [
        Rule("the columns are the listed ones and no other", "ExpectTableColumnsToMatchSet",
             {"column_set": [*COLUMNS, "split"], "exact_match": True}),
        Rule("no two rows are one image", "ExpectCompoundColumnsToBeUnique",
             {"column_list": ["image", "row"]}),
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
    labelled = question.section.kind is Kind.CLASSIFICATION
    told = Severity.CRITICAL if question.built else Severity.WARNING  # a mask may show more than the label
    return [
        _true("the pixels are those of the sha256", "digest_holds"),
        _true("every pixel is a finite number", "finite"),
        _between("no pixel is below the range", "lowest", check.pixel_low, check.pixel_high),
        _between("no pixel is above the range", "highest", check.pixel_low, check.pixel_high),
        _in_set("pixels are stored in a known type", "type", list(STORED_TYPES)),
        _single("all images have one type", "type"),
        _single("all images have one shape", "shape"),
        _true("masks are where they must be, and of their image's shape", "mask_fits"),
        _between("mask labels are classes", "mask_highest", -1 if labelled else 0, highest),
        _true("the label agrees with the mask", "mask_agrees", told),
        _true("no image was made in the future", "past"),
        _between("no pixels are in two splits", "splits", 1, 1),
        _true("no image nearly repeats one of another split", "unlike", Severity.WARNING),
    ]


def subject_rules(question: Question) -> list[Rule]:
    """Subjects: one side each, where the cohort knows them."""
    known = [_between("a subject is in one split", "splits", 1, 1)] if question.subject_split else []
    return [
        *known,
        _between("a subject is of one site", "sites", 1, 1),
        _between("a subject has one sex", "sexes", 1, 1),
        _true("site_kind is that of sites.yaml", "kind_holds"),
        _true("external sites are in the external split and internal ones never", "side_holds"),
    ]


def stratum_rules(question: Question) -> list[Rule]:
    """Splits and sites: subjects enough, and every class; in validation, of all sites together."""
    how = question.section.split
    outside = len(question.sites.names(SiteKind.EXTERNAL)) + len(how.left_out)
    strata = 3 * (len(question.sites.sites) - outside) + outside + 2 * len(how.local)
    least, classes = question.section.check.subjects_per_split_and_site, len(question.section.classes)
    sides = {"column": "split", "value_set": [str(side) for side in Split if side is not Split.EXTERNAL]}
    # A built cohort is at every site; an import is at those that it names.
    everywhere = Rule("every site is in each of its splits", "ExpectTableRowCountToEqual",
                      {"value": strata})  # fmt: skip
    somewhere = Rule("each split has images", "ExpectColumnDistinctValuesToContainSet", sides)
    return [
        everywhere if question.built else somewhere,
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


def _true(sentence: str, column: str, severity: Severity = Severity.CRITICAL) -> Rule:
    return replace(_in_set(sentence, column, [True]), severity=severity)


def _single(sentence: str, column: str) -> Rule:
    return Rule(
        sentence,
        "ExpectColumnUniqueValueCountToBeBetween",
        {"column": column, "min_value": 1, "max_value": 1},
    )
