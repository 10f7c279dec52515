"""A trial in numbers: verdict, agreement, differences with intervals, discordant cases, failures, times."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from imaging.intervals import Estimate
from imaging.vocabulary import Endpoint, TrialVerdict
from registry.trials.plan import SITE_SUBJECTS, Plan
from registry.trials.rows import Shown
from registry.trials.stopping import Values, estimate_mean, judge_values, value_subjects

COMPARED = {
    Endpoint.AGREEMENT: (
        "Findings at the operating point are compared, without any truth: it says how often the challenger "
        "would have answered otherwise, not who is right. Passed means: less than {margin:g} of the subjects "
        "get another finding, so that accuracy has not fallen by more than that."
    ),
    Endpoint.ACCURACY: (
        "Right answers are compared, by the truth that came later; cases without it decide nothing. Passed "
        "means: accuracy is not below the champion's by {margin:g} or more."
    ),
}


def judge(plan: Plan, rows: list[Shown]) -> str:
    """The verdict so far."""
    values, ends = _value(plan, rows)
    return str(judge_values(plan, values, ends)[0])


def _value(plan: Plan, rows: list[Shown]) -> tuple[Values, list[int]]:
    return value_subjects(*_score(plan, _decide(plan, rows)), plan.look)


def _decide(plan: Plan, rows: list[Shown]) -> list[Shown]:
    """What decides, in the order of the cases, or of the truths where these decide."""
    return _label(rows) if plan.endpoint is Endpoint.ACCURACY else _count(rows)


def _count(rows: list[Shown]) -> list[Shown]:
    """Two images of somebody unknown may be of one person: they decide nothing."""
    return [row for row in rows if row.subject is not None]


def _label(rows: list[Shown]) -> list[Shown]:
    return sorted(
        (row for row in _count(rows) if row.truth_seq is not None), key=lambda row: row.truth_seq or 0
    )


def _count_deciding(plan: Plan, rows: list[Shown], after: int) -> dict[str, int]:
    """Of the subjects that the verdict rests on, those of each site; who came later had no part in it."""
    people = dict.fromkeys((row.site, row.subject) for row in _decide(plan, rows))
    return dict(Counter(site for site, _ in list(people)[:after]))


def report(plan: Plan, rows: list[Shown], dropped: int) -> dict[str, Any]:
    """What the rows of a trial say by its plan.

    Returns:
        JSON: verdict and the sentence that explains it; what was compared; counts of cases, subjects, looks,
        drops, failures, labels; `disagreement` (0 to 1), `positives` and `accuracy` (challenger minus
        champion, -1 to 1), each an estimate with an interval that holds at every look, or null; milliseconds
        as [median, 99th percentile]; by site; subjects that decide by site, and how many of them a site needs
        to have passed; and the ids of the discordant predictions.
    """
    counted, labelled = _count(rows), _label(rows)
    values, ends = _value(plan, rows)
    verdict, after = judge_values(plan, values, ends)
    failures = Counter(row.failure for row in rows if row.failure)
    return {
        "verdict": str(verdict), "after_subjects": after, "told": _tell(plan, verdict, after, len(ends)),
        "compared": COMPARED[plan.endpoint].format(margin=plan.margin),
        "cases": len(rows), "subjects": len({(row.site, row.subject) for row in counted}),
        "without_subject": len(rows) - len(counted), "labelled": len(labelled), "dropped": dropped,
        "failures": dict(failures), "looks": len(ends), "disagreement": _disagree(plan, counted),
        "positives": _differ(plan, counted, _call), "accuracy": _differ(plan, labelled, _grade),
        "milliseconds": _time([row for row in rows if not row.failure]),
        "sites": {site: _describe(plan, [row for row in counted if row.site == site])
                  for site in sorted({row.site for row in counted})},
        "deciding": _count_deciding(plan, rows, after), "needed_at_a_site": SITE_SUBJECTS,
        "discordant": [row.prediction for row in rows if row.difference > plan.margin],
    }  # fmt: skip


def _score(plan: Plan, rows: list[Shown]) -> tuple[list[str], list[float]]:
    """Subject and score of each case: 1 is the challenger's best, 0 its worst."""
    people = [f"{row.site} {row.subject}" for row in rows]
    if plan.endpoint is Endpoint.AGREEMENT:
        return people, [1 - row.difference for row in rows]
    return people, [(1 + _grade(row)) / 2 for row in rows]


def _grade(row: Shown) -> float:
    """1 where only the challenger is right, -1 where only the champion is; no answer is not right."""
    return float(row.positive == row.truth) - float(row.champion_positive == row.truth)


def _call(row: Shown) -> float:
    """1 where only the challenger says positive, -1 where only the champion does."""
    return float(row.positive or False) - float(row.champion_positive or False)


def _disagree(plan: Plan, rows: list[Shown]) -> dict[str, Any] | None:
    people, scores = [f"{row.site} {row.subject}" for row in rows], [row.difference for row in rows]
    return _dump(estimate_mean(value_subjects(people, scores, plan.look)[0], plan.alpha))


def _differ(plan: Plan, rows: list[Shown], told: Any) -> dict[str, Any] | None:
    """A paired difference, challenger minus champion, of cases whose finding is yes or no."""
    rows = [row for row in rows if row.champion_positive is not None]
    people, scores = [f"{row.site} {row.subject}" for row in rows], [(1 + told(row)) / 2 for row in rows]
    return _dump(estimate_mean(value_subjects(people, scores, plan.look)[0], plan.alpha, (-1.0, 1.0)))


def _dump(told: Estimate | None) -> dict[str, Any] | None:
    return told.model_dump() if told else None


def _describe(plan: Plan, rows: list[Shown]) -> dict[str, Any]:
    return {"cases": len(rows), "subjects": len({row.subject for row in rows}),
            "disagreement": _disagree(plan, rows)}  # fmt: skip


def _time(rows: list[Shown]) -> dict[str, list[float]] | None:
    if not rows:
        return None
    spent = {"champion": [row.champion_ms for row in rows], "challenger": [row.wall_ms for row in rows],
             "challenger_cpu": [row.cpu_ms for row in rows]}  # fmt: skip
    return {name: [round(float(ms), 3) for ms in np.percentile(one, [50, 99])] for name, one in spent.items()}


def _tell(plan: Plan, verdict: TrialVerdict, after: int, looks: int) -> str:
    words = {
        TrialVerdict.RUNNING: f"No verdict yet, {after} of at most {plan.size} subjects, {looks} looks.",
        TrialVerdict.PASSED: f"Passed after {after} subjects.",
        TrialVerdict.FAILED: f"Failed after {after} subjects: it is beyond the margin.",
        TrialVerdict.UNDECIDED: f"Undecided: {after} subjects were not enough for a verdict.",
    }
    return f"{words[verdict]} A verdict is wrong in at most {100 * plan.alpha:g} % of trials."
