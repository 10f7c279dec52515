"""A site's acceptance: how many cases it takes, whether they look as they should, what should be its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from sqlalchemy import text

from imaging.config import Places
from imaging.errors import DataError
from imaging.vocabulary import Kind
from monitoring import conformal, recalibration
from monitoring.labels import read_labels
from monitoring.records import Records, now
from monitoring.windows import PERMUTATIONS, compare_windows
from registry.bounds import hold
from registry.ledger import Ledger
from registry.package import Contract, read_contract, shelf
from registry.policy import Policy, read_policy
from registry.predictions import Predictions
from registry.profiles import NEGATIVE, POSITIVE, Draft, SiteProfile
from registry.projection import AXES

SUBJECTS = 200  # the first so many of a site are compared with the reference
LEVEL = 0.01  # of that test
FEW = 20  # subjects that it needs on each side
SEED = 7
ALPHA = 0.05  # one-sided, of a sample size


@dataclass(frozen=True)
class Wishes:
    """What may be a site's own.

    Attributes:
        recalibrate: if subjects that it was not fitted to confirm it.
        sensitivity: a threshold that keeps so much of it; None keeps the contract's.
        alpha: of prediction sets; None answers every case.
        subjects: the first so many are compared with the reference.
    """

    recalibrate: bool = True
    sensitivity: float | None = None
    alpha: float | None = None
    subjects: int = SUBJECTS


@dataclass(frozen=True)
class Sample:
    """One row a subject, their first image, in the order of the journal.

    Attributes:
        ids: of the answers.
        people: pseudonyms, or ids where the request named nobody.
        images: sha256 of what was sent.
        raw: probability of a positive before any profile.
        truth: 1, 0, or NaN where nobody said.
        axes: embeddings, (n, axes); NaN where the package has none.
    """

    ids: NDArray[Any]
    people: NDArray[Any]
    images: NDArray[Any]
    raw: NDArray[np.float64]
    truth: NDArray[np.float64]
    axes: NDArray[np.float64]

    def take(self, rows: Any) -> Sample:
        """Some subjects, by number or by mask."""
        return Sample(*(values[rows] for values in vars(self).values()))

    def describe(self) -> dict[str, Any]:
        """How many, and a digest of which answers with which truth."""
        lines = "".join(f"{one} {image} {truth}\n" for one, image, truth
                        in zip(self.ids, self.images, self.truth, strict=True))  # fmt: skip
        return {"subjects": len(self.ids), "rows": "sha256:" + hashlib.sha256(lines.encode()).hexdigest()}


@dataclass
class Acceptance:
    """Looks at one version at one site.

    Args:
        places: where packages and policies lie.
        records: beside the journal.
        ledger: which package is which version.
        place: task, site and version.
    """

    places: Places
    records: Records
    ledger: Ledger
    place: tuple[str, str, int]
    digest: str = field(init=False)
    contract: Contract = field(init=False)
    policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        """Find the package.

        Raises:
            UnknownVersion: the task has no such version.
            DataError: it answers masks, which have no operating point.
        """
        task, _, version = self.place
        self.digest = self.ledger.version(task, version)[0]
        self.contract = read_contract(shelf(self.places.var, self.digest))
        self.policy = read_policy(task, self.places.policies)
        if self.contract.kind is Kind.SEGMENTATION:
            raise DataError(f"{task} answers masks, which have no operating point.",
                            "Only a score can have a site's own.")  # fmt: skip

    def draft(self, wishes: Wishes) -> Draft:
        """What the site's answers show, and the profile that follows; unsigned.

        Raises:
            DataError: there is nothing to look at, or too few subjects for an abstention that is wished.
        """
        task, site, version = self.place
        sample = read_sample(self.records, *self.place)
        known = sample.take(np.isfinite(sample.truth))
        if wishes.sensitivity is not None:
            _check_positives(int((known.truth == 1).sum()), wishes.sensitivity)
        line, chosen = (0.0, 1.0), {"chosen": recalibration.NOTHING, "why": "not wished"}
        if wishes.recalibrate:
            line, chosen = recalibration.choose_line(known.raw, known.truth)
        method = chosen["chosen"]
        profile = self._settle(known, line, wishes)
        evidence = {
            "made": now(), "sample": sample.describe(), "labelled": self._count(known),
            "reference": compare_reference(sample.take(slice(wishes.subjects)),
                                           shelf(self.places.var, self.digest), site),
            "contract": self._judge(known, known.raw, np.full(len(known.raw), self.contract.threshold)),
            "profile": self._judge(known, *self._cross(known, method, wishes)),
            "recalibration": chosen, "wished": vars(wishes),
        }  # fmt: skip
        if profile.abstention:
            evidence["sets_on_calibration_subjects"] = self._cover(known, profile)
        return Draft(task, version, self.digest, profile, json.loads(json.dumps(evidence, allow_nan=False)))

    def _settle(self, known: Sample, line: tuple[float, float], wishes: Wishes) -> SiteProfile:
        plain = SiteProfile(site=self.place[1], intercept=line[0], slope=line[1])
        p, threshold = plain.recalibrate(known.raw), None
        if line != (0.0, 1.0):  # by itself it changes no decision
            threshold = float(plain.recalibrate(self.contract.threshold))
        if wishes.sensitivity is not None:
            threshold = conformal.find_lowest(p[known.truth == 1], 1 - wishes.sensitivity)
        abstention = conformal.calibrate(p, known.truth, wishes.alpha) if wishes.alpha else None
        return plain.model_copy(update={"threshold": threshold, "abstention": abstention})

    def _cross(self, known: Sample, method: str, wishes: Wishes) -> tuple[NDArray[Any], NDArray[Any]]:
        """Probability and threshold of each subject, by a profile that the other folds made."""
        p = known.raw.copy()
        thresholds = np.full(len(p), self.contract.threshold)
        folds = recalibration.draw_folds(known.truth)
        for fold in np.unique(folds):
            here, rest = folds == fold, known.take(folds != fold)
            line = recalibration.fit_line(rest.raw, rest.truth, method)
            profile = self._settle(rest, line, Wishes(True, wishes.sensitivity))
            p[here] = profile.recalibrate(known.raw[here])
            thresholds[here] = self._threshold(profile)
        return p, thresholds

    def _cover(self, known: Sample, profile: SiteProfile) -> dict[str, float]:
        """Of the sets as they would be told: which share holds the truth, by class, and which abstains."""
        p, threshold = profile.recalibrate(known.raw).tolist(), self._threshold(profile)
        told = [profile.tell(one, one >= threshold) for one in p]
        held = np.array([(NEGATIVE, POSITIVE)[int(truth)] in one["prediction_set"]
                         for truth, one in zip(known.truth, told, strict=True)])  # fmt: skip
        shares = {POSITIVE: held[known.truth == 1], NEGATIVE: held[known.truth == 0],
                  "abstained": [one["abstained"] for one in told]}  # fmt: skip
        return {name: float(np.mean(values)) for name, values in shares.items()}

    def _threshold(self, profile: SiteProfile) -> float:
        return self.contract.threshold if profile.threshold is None else profile.threshold

    def _judge(self, known: Sample, p: NDArray[Any], thresholds: NDArray[Any]) -> dict[str, Any]:
        """What the policy's bounds for an external site say, as the gate would put it."""
        right = ((p >= thresholds) == known.truth).astype(float)
        scores = {"truth": known.truth.astype(int), "probability": p, "right": right.astype(int)}
        nothing = np.full(len(p), "")
        here = Predictions(known.images, known.people, nothing, nothing, scores, self.contract.threshold)
        confidence = 1 - 2 * self.policy.alpha
        told = list(hold(here, [], self.policy.external, confidence)) if len(p) else []
        reasons = [one.reason for one in told] or ["no labels"]
        return {"passed": bool(told) and all(one.passed for one in told), "reasons": reasons,
                "confidence": confidence, **_share_right(known.truth, right)}  # fmt: skip

    def _count(self, known: Sample) -> dict[str, Any]:
        positives = int((known.truth == 1).sum())
        return {**known.describe(), "positives": positives, "negatives": len(known.truth) - positives}


def size(truth: float, bound: float, power: float = 0.8, effect: float = 1.0) -> int:
    """How many positives show that sensitivity reaches a bound (or negatives, specificity).

    The exact binomial test, one-sided at 5 %: the smallest number of cases that rejects a share of `bound`
    with the asked power where the share is `truth`.

    Args:
        truth: the share that is expected, above the bound.
        bound: of the policy.
        power: of the test.
        effect: design effect, 1 for one image a subject.

    Raises:
        DataError: the truth does not exceed the bound, or no 100,000 cases are enough.
    """
    from scipy.stats import binom

    if not 0 < bound < truth <= 1 or effect < 1:
        raise DataError(f"Truth {truth:g} does not exceed the bound {bound:g}, or an effect is below 1.",
                        "Expect more, or ask for less.")  # fmt: skip
    for start in range(1, 100_000, 1000):
        cases = np.arange(start, start + 1000)
        least = binom.ppf(1 - ALPHA, cases, bound)  # more hits than this reject the bound
        if (enough := np.flatnonzero(binom.sf(least, cases, truth) >= power)).size:
            return int(np.ceil(cases[enough[0]] * effect - 1e-9))
    raise DataError("No 100,000 cases are enough.", "Expect more, or ask for less.")


def read_sample(records: Records, task: str, site: str, version: int) -> Sample:
    """The answers of a version at a site, one a subject: the first that has a truth, else the first.

    Raises:
        DataError: the journal has none.
    """
    truths = {row["prediction"]: row["truth"] for row in read_labels(records, task, site, version)}
    query = text(
        "SELECT id, subject, image, columns FROM predictions WHERE task = :task AND site = :site AND "
        "version = :version ORDER BY seq"
    )
    rows: dict[str, tuple[Any, ...]] = {}
    with records.engine.connect() as connection:
        for number, subject, image, columns in connection.execute(
            query, {"task": task, "site": site, "version": version}
        ):
            held, person = rows.get(subject or number), subject or number
            if held is None or (held[4] is None and number in truths):
                told = orjson.loads(columns)
                raw = told.get("raw_probability", told.get("probability"))
                axes = [told.get(name, np.nan) for name in AXES]
                rows[person] = (number, person, image, raw, truths.get(number), axes)
    if not rows:
        raise DataError(f"{task} v{version} has answered nothing at {site}.", "Send its first cases.")
    ids, people, images, raws, known, embedded = zip(*rows.values(), strict=True)
    return Sample(
        np.array(ids), np.array(people), np.array(images), np.array(raws, float),
        np.array([np.nan if one is None else one for one in known], float), np.array(embedded, float),
    )  # fmt: skip


def compare_reference(sample: Sample, package: Path, site: str) -> dict[str, Any]:
    """One two-sample test of embeddings against the package's fixed reference.

    Args:
        sample: the site's first subjects.
        package: whose reference.parquet is asked; of the site itself where it has it, else of all sites.
        site: the site.
    """
    import pandas as pd

    table = pd.read_parquet(package / "reference.parquet").drop_duplicates("subject")
    names = [name for name in AXES if name in table]
    own = table[table["site"] == site]
    whose = "the site" if len(own) >= FEW else "all sites"
    reference = (own if len(own) >= FEW else table)[names].to_numpy(float)
    window = sample.axes[:, : len(names)]
    window = window[np.isfinite(window).all(axis=1)]
    told = {"of": whose, "reference": len(reference), "subjects": len(window), "level": LEVEL}
    if not names or min(len(reference), len(window)) < FEW:
        why = "the package keeps no embeddings" if not names else f"fewer than {FEW} subjects on a side"
        return {**told, "compared": False, "why": why}
    statistic, p = compare_windows(reference, window, PERMUTATIONS, SEED)
    return {**told, "compared": True, "statistic": round(statistic, 4), "p": p, "differs": p <= LEVEL}


def _check_positives(count: int, sensitivity: float) -> None:
    needed = max(FEW, int(np.ceil(1 / (1 - sensitivity) - 1e-9)) - 1)
    if count < needed:
        raise DataError(f"A threshold that keeps a sensitivity of {sensitivity:g} rests on {needed} labelled "
                        f"positives; {needed - count} are missing.", "Label more.")  # fmt: skip


def _share_right(truth: NDArray[Any], right: NDArray[Any]) -> dict[str, float | None]:
    shares = {"sensitivity": right[truth == 1], "specificity": right[truth == 0]}
    return {name: round(float(one.mean()), 4) if len(one) else None for name, one in shares.items()}
