"""What a policy asks of monitoring: how seldom it may be wrong, and what an alarm does."""

from __future__ import annotations

from pydantic import Field

from imaging.recipe import Section
from imaging.vocabulary import Containment, Part, Unit


class Surveillance(Section):
    """A policy's `surveillance`.

    Attributes:
        budget_days: one false alarm at a site in so many days, for all tasks, streams and windows together.
        tasks: at a site, each of which spends an equal part of its budget.
        unit: `subject` only where the days of a site do not differ from each other.
        per_day: subjects a day that `unit: subject` reckons with; more of them alarm more often.
        allowance: of the charts, in standard deviations of a value; half the shift that is looked for.
        window: subjects in a window of the two-sample test.
        window_days: least days that a window spans where the unit is a day.
        window_share: of the budget that the two-sample test may spend; the charts have the rest.
        least: values before a chart may judge; fewer are "not enough cases".
        contain: what an alarm does to its site.
        parts: only alarms of these parts contain; the others are told.
        weights: of the parts in the combined score, which is for the eye and alarms nobody.
    """

    budget_days: float = Field(default=180, gt=0)
    tasks: int = Field(default=1, ge=1)
    unit: Unit = Unit.DAY
    per_day: float = Field(default=20, gt=0)
    allowance: float = Field(default=0.5, gt=0, le=2)
    window: int = Field(default=100, ge=20)
    window_days: int = Field(default=14, ge=1)
    window_share: float = Field(default=0.25, gt=0, lt=1)
    least: int = Field(default=20, ge=5)
    contain: Containment = Containment.NOTIFY
    parts: tuple[Part, ...] = tuple(Part)
    weights: dict[Part, float] = Field(default_factory=lambda: dict.fromkeys(Part, 1.0))

    @property
    def task_days(self) -> float:
        """One false alarm of this task at a site in so many days."""
        return self.budget_days * self.tasks
