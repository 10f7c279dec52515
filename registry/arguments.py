"""What actions ask for: pydantic models, from which commands and HTTP calls take their arguments."""

from __future__ import annotations

from pydantic import Field

from imaging.recipe import Section
from registry.trials.plan import MOST_WEIGHT, Plan


class Nothing(Section):
    """No arguments."""


class OnTask(Section):
    """Arguments of what concerns a task."""

    task: str = Field(description="A task of params.yaml.")


class OnVersion(OnTask):
    """Arguments of what concerns a version."""

    version: int = Field(description="Its number.", ge=1)


class Asked(OnVersion):
    """Arguments of a request."""

    dry_run: bool = Field(False, description="Say the verdict and write nothing.")


class Reasoned(Section):
    """A decision says why."""

    because: str = Field(
        description="Why, in a sentence; it stands in the ledger.", min_length=2, max_length=1000
    )


class Sited(Section):
    """A decision may be about some sites."""

    sites: tuple[str, ...] = Field(
        (), description="A site; may be given again. Default: all that it concerns."
    )


class OnTaskReasoned(Reasoned, OnTask):
    """Arguments of a decision about a task."""


class OnVersionReasoned(Reasoned, OnVersion):
    """Arguments of a decision about a version."""


class OnVersionAtSites(Sited, OnVersionReasoned):
    """Arguments of a decision about a version at some sites."""


class OnTaskAtSites(Sited, Reasoned, OnTask):
    """Arguments of a decision about a task at some sites."""


class Tried(OnVersionAtSites, Plan):
    """Arguments of a silent trial."""

    def plan(self) -> Plan:
        """What is registered before the first case."""
        return Plan.model_validate({name: getattr(self, name) for name in Plan.model_fields})


class Shared(OnVersionAtSites):
    """Arguments of a canary."""

    weight: float = Field(
        ge=0, le=MOST_WEIGHT, description="The share of studies that it answers, at most 0.5; 0 ends it."
    )


class Drafted(OnTaskReasoned):
    """Arguments of a site profile."""

    draft: str = Field(
        description="A file in var/profiles, as `monitoring accept` writes it.",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._@-]{0,199}$",
    )


class Looked(Section):
    """Arguments of the history."""

    task: str | None = Field(None, description="Only this task.")


class Pair(OnTask):
    """Arguments of a comparison."""

    first: int = Field(description="A version.", ge=1)
    second: int = Field(description="Another one.", ge=1)


class Named(Reasoned):
    """Arguments of a restoration."""

    name: str = Field(description="A backup in var/backups.", pattern=r"^[A-Za-z0-9._-]{1,200}$")
