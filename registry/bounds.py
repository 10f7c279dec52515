"""What the predictions at one place show: bounds reached or not, and by how much a version may be worse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from imaging.estimation import BY_CLASS, count_rarer, measure, name_stem
from imaging.intervals import Estimate
from registry.comparison import compare
from registry.policy import Bounds, spell
from registry.predictions import Predictions, pair_up


class Comparison(BaseModel):
    """The bound of how much better a metric is than in another version, paired by subject; below 0 worse.

    `low` must not be further below 0 than `margin`. Authors read verdicts, so no estimate stands here.
    """

    model_config = ConfigDict(frozen=True)
    metric: str
    against: str
    low: float
    margin: float
    passed: bool


class Shown(NamedTuple):
    """One thing that was asked: passed or not, said in a sentence."""

    passed: bool
    reason: str
    comparison: Comparison | None = None


def hold(
    here: Predictions, others: Sequence[tuple[str, Predictions | str]], bounds: Bounds, confidence: float
) -> Iterator[Shown]:
    """Hold a version to the bounds on its own scores.

    Args:
        here: its predictions at the place.
        others: what each version beside it is, and its predictions, or why there are none.
        bounds: of the place.
        confidence: two-sided.
    """
    asked = {**bounds.low, **bounds.high, **bounds.margin}
    for metric in here.scores:  # each class too: their mean leaves out one without a value
        if (stem := name_stem(metric)) in BY_CLASS and (metric in asked or stem in asked):
            most = bounds.unscored if metric in asked else 1.0
            yield from _find_unscored(here, others, metric, most)
    for metric, limit in bounds.low.items():
        yield _hold(here, (metric, limit, 1), bounds.subjects, confidence)
    for metric, limit in bounds.high.items():
        yield _hold(here, (metric, limit, -1), bounds.subjects, confidence)


def _find_unscored(
    here: Predictions, others: Sequence[tuple[str, Predictions | str]], metric: str, most: float
) -> Iterator[Shown]:
    """Refuse where a missing value may hide a failure: a mean leaves it out.

    An empty answer has no distance, but a Dice of 0. Dice is missing where neither truth nor answer has the
    class: so a Dice of 0 in another version may be a false alarm, and one above 0 says that the truth has it.
    """
    missing, name = here.images[~np.isfinite(here.scores[metric])], spell(metric)
    floor, alone = 0.0 if name_stem(metric) == "dice" else -np.inf, missing
    for against, other in others:
        if isinstance(other, str) or metric not in other.scores:
            continue
        values = other.scores[metric][np.isin(other.images, missing)]
        if lost := int((values > floor).sum()):
            yield Shown(False, f"{name} is missing on {lost} images where {against} has it")
        alone = np.setdiff1d(alone, other.images)
    if len(alone) > most * len(here.images):
        yield Shown(False, f"{name} is missing on {len(alone)} of {len(here.images)} images, where no other "
                           f"version tells why; {most:.0%} may be, by the policy's `unscored`")  # fmt: skip


def _hold(here: Predictions, asked: tuple[str, float, int], subjects: int, confidence: float) -> Shown:
    """Hold a metric to its limit; the sign is 1 for a lower limit, -1 for an upper one."""
    (metric, limit, sign), name = asked, spell(asked[0])
    told = measure_place(metric, here, confidence)
    if told is None:
        return Shown(False, f"{name} was not evaluated here, or cannot be")
    if told.subjects < subjects:
        return Shown(False, f"{name} rests on {told.subjects} subjects, fewer than {subjects}")
    end, asks = (told.low, "asked for") if sign > 0 else (told.high, "allowed")
    passed = bool(sign * end >= sign * limit)  # NaN fails
    sides = ("is at least", "may be as low as") if sign > 0 else ("is at most", "may be as high as")
    side = sides[0] if passed else sides[1]
    return Shown(passed, f"{name} {side} {_round(end, -sign)}, and {limit:g} is {asks}")


def measure_place(metric: str, here: Predictions, confidence: float) -> Estimate | None:
    """As `imaging.estimation.measure`, but an AUC rests on the subjects of the rarer class."""
    told = measure(metric, here.scores, here.people, confidence)
    if told is None or metric != "auc":
        return told
    return told.model_copy(update={"subjects": count_rarer(here.scores["truth"], here.people)})


def compare_versions(
    pair: tuple[Predictions, Predictions | str], against: str, bounds: Bounds, confidence: float
) -> Iterator[Shown]:
    """Hold how much worse a version may be than another to the margins, on the images that both answered.

    Args:
        pair: predictions at the place, and those of the other version anywhere, or why there are none.
        against: what the other version is.
        bounds: of the place.
        confidence: two-sided.
    """
    here, other = pair
    again = f"score {against.split()[-1]} again: formulary training rescore"
    if isinstance(other, str):
        yield Shown(False, f"{against}: {other.removesuffix('.')}; {again}")
        return
    people, scores = pair_up(here, other)
    hint = f"; {again}" if len(people) < len(here.people) else ""
    for metric, margin in bounds.margin.items():
        name, told = spell(metric), compare(metric, scores, people, confidence)
        count = told.subjects if told else 0
        if told is None or count < bounds.subjects:
            yield Shown(False, f"{name} of {against} and of this version rest on {count} common subjects, "
                               f"fewer than {bounds.subjects}{hint}")  # fmt: skip
        elif not np.isfinite([told.estimate, told.low, told.high]).all():
            yield Shown(False, f"{name} cannot be compared with {against}: {told.method}")
        else:
            yield _judge(metric, against, told, margin)


def _judge(metric: str, against: str, told: Estimate, margin: float) -> Shown:
    passed, worst = told.low >= -margin, _round(max(0.0, -told.low), 1)
    found = Comparison(metric=metric, against=against, low=told.low, margin=margin, passed=passed)
    may = ("is not worse than {} by more than {}" if passed else "may be worse than {} by up to {}").format(
        against, worst
    )
    return Shown(passed, f"{spell(metric)} {may}; {margin:g} is allowed", found)


def _round(value: float, sign: int) -> str:
    """To three digits, upwards (1) or downwards (-1), so that no bound looks better than it is."""
    return f"{sign * np.ceil(sign * value * 1000 - 1e-6) / 1000 + 0.0:.3f}"
