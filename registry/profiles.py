"""A site's own settings of an approved package: threshold, recalibration, abstention; two people store it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError

from imaging.config import explain
from imaging.errors import Conflict, DataError, Forbidden, RegistryError, TrustError, Unreadable
from imaging.recipe import Section
from imaging.vocabulary import Decision
from registry.events import Event, canonical
from registry.signing import Signer, check_signature

if TYPE_CHECKING:
    from registry.access import Acting
    from registry.ledger import Writer

NEGATIVE, POSITIVE = "negative", "positive"
SMALLEST = 1e-6  # a probability beside 0 or 1 keeps a logit


class Abstention(Section):
    """Which probabilities decide nothing: class-conditional split conformal thresholds of a site.

    Attributes:
        alpha: share of the cases of a class whose prediction set may lack the truth.
        positive_from: from this probability on the set has `positive`.
        negative_to: up to this probability the set has `negative`.
        positives: calibration subjects that were positive.
        negatives: calibration subjects that were negative.
    """

    alpha: float = Field(gt=0, lt=0.5)
    positive_from: float = Field(ge=0, le=1)
    negative_to: float = Field(ge=0, le=1)
    positives: int = Field(ge=50)
    negatives: int = Field(ge=50)

    def name(self, probability: float, positive: bool) -> list[str]:
        """The prediction set; where it is not one class, the answer abstains.

        The threshold that answers knows nothing of these limits, so a set may have one class and the answer
        be the other. Such a set gets both: a larger one lacks the truth no more often, so the promise holds.

        Args:
            probability: of a positive.
            positive: the answer at the threshold.
        """
        held = {NEGATIVE: probability <= self.negative_to, POSITIVE: probability >= self.positive_from}
        named = [name for name, holds in held.items() if holds]
        return [NEGATIVE, POSITIVE] if named == [NEGATIVE if positive else POSITIVE] else named

    def guarantee(self, site: str) -> str:
        """What is promised of the sets, and of nothing else."""
        return (f"{100 * (1 - self.alpha):g} % of the prediction sets hold the truth, of positive and of "
                f"negative cases each, on average over calibration samples such as this one "
                f"({self.positives} positive and {self.negatives} negative subjects of {site}); nothing is "
                "promised of the answered cases alone")  # fmt: skip


class SiteProfile(Section):
    """What is different at a site. The probability is `1 / (1 + exp(-(intercept + slope * logit)))`.

    Attributes:
        number: which profile of the task at the site it is; the ledger gives it.
        site: whose answers.
        threshold: instead of the contract's, of the recalibrated probability; None keeps the contract's.
        intercept: of the recalibration, in logits.
        slope: of the recalibration; above 0, so that no two images change places.
        abstention: None answers every image.
    """

    number: int = Field(default=0, ge=0)
    site: str
    threshold: float | None = Field(default=None, ge=0, le=1)
    intercept: float = Field(default=0.0, ge=-20, le=20)
    slope: float = Field(default=1.0, gt=0, le=20)
    abstention: Abstention | None = None

    def recalibrate(self, probability: ArrayLike) -> NDArray[np.float64]:
        """The site's probability of what the network says; the same where nothing is recalibrated."""
        values = np.asarray(probability, np.float64)
        if (self.intercept, self.slope) == (0.0, 1.0):
            return values
        inner = np.clip(values, SMALLEST, 1 - SMALLEST)
        return 1 / (1 + np.exp(-(self.intercept + self.slope * np.log(inner / (1 - inner)))))

    def note(self, raw: float, positive: bool) -> dict[str, float]:
        """What the journal keeps of it: a later profile is made from the probability before this one."""
        probability = float(self.recalibrate(raw))
        told = {"probability": probability, "raw_probability": raw, "profile": float(self.number)}
        if self.threshold is not None:
            told["threshold"] = self.threshold
        if self.abstention:
            told["abstained"] = float(len(self.abstention.name(probability, positive)) != 1)
        return told

    def tell(self, probability: float, positive: bool) -> dict[str, Any]:
        """What an answer says of it; where its prediction set is not one class, it decides nothing."""
        if not self.abstention:
            return {"profile": self.number}
        named = self.abstention.name(probability, positive)
        told = {"profile": self.number, "abstained": len(named) != 1, "prediction_set": named,
                "guarantee": self.abstention.guarantee(self.site)}  # fmt: skip
        return told if len(named) == 1 else {**told, "positive": None}


@dataclass(frozen=True)
class Draft:
    """A profile that its maker signed and nobody has stored.

    Attributes:
        task: the task.
        version: of the package.
        digest: of the package; on no other one the profile is used.
        profile: what would be different.
        evidence: numbers, and digests of the rows behind them.
        by: who made it.
        key: id of the maker's key.
        signature: of the maker, over all of this.
    """

    task: str
    version: int
    digest: str
    profile: SiteProfile
    evidence: dict[str, Any]
    by: str = ""
    key: str = ""
    signature: str = ""

    def describe(self) -> dict[str, Any]:
        """As a file has it, and a record of the ledger."""
        return {**vars(self), "profile": self.profile.model_dump(mode="json")}

    def message(self) -> bytes:
        """What is signed: everything but key and signature."""
        signed = {name: value for name, value in self.describe().items() if name not in ("key", "signature")}
        return canonical(signed).encode()

    def sign(self, signer: Signer) -> Draft:
        """The same by its maker."""
        mine = Draft(self.task, self.version, self.digest, self.profile, self.evidence, signer.actor)
        return Draft(**{**vars(mine), "key": signer.key_id, "signature": signer.sign(mine.message())})


def write_draft(draft: Draft, path: Path) -> None:
    """Write a draft for the person who will store it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(draft.describe(), indent=1, sort_keys=True) + "\n")


def read_draft(path: Path) -> Draft:
    """Read a draft.

    Raises:
        Unreadable: it is missing, or not a draft.
    """
    fix = "Make one: formulary monitoring accept TASK VERSION --site SITE"
    try:
        told = json.loads(path.read_bytes())
        return Draft(**{**told, "profile": SiteProfile.model_validate(told["profile"])})
    except ValidationError as error:
        raise Unreadable(f"{path.name}: {explain(error, SiteProfile)}.", fix) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unreadable(f"{path.name} is no draft of a profile in var/profiles.", fix) from error


def store_profile(acting: Acting, task: str, draft: Draft) -> Event:
    """Let a site's answers follow a draft that another person made; a later one takes its place.

    Raises:
        TrustError: its maker's signature does not hold.
        Forbidden: who stores it made it.
        Conflict: it belongs to another task, or to a package that does not serve there.
    """
    profile, site = draft.profile, draft.profile.site
    with acting.ledger.writing() as writer:
        _check_maker(writer, draft)
        if acting.signer.actor == draft.by:
            raise Forbidden(f"{draft.by} made this profile.", "Another person stores it: --identity NAME.")
        held = writer.state(task).trail.get(site, ())
        if draft.task != task or [one.digest for one in held][-1:] != [draft.digest]:
            raise Conflict(
                f"The draft is for {draft.task} v{draft.version}, no champion of {task} at {site}.",
                "Make another one: formulary monitoring accept.",
            )
        number = 1 + len(list_profiles(writer.events(), task, site))
        body = {**draft.describe(), "profile": {**profile.model_dump(mode="json"), "number": number},
                "sites": [site], "number": number, "because": acting.because}  # fmt: skip
        del body["task"]
        return writer.append(Decision.PROFILED, task, body, acting.signer)


def drop_profile(acting: Acting, task: str, sites: tuple[str, ...]) -> list[str]:
    """Take the profiles of a task back, at some sites, or at every site when none is named.

    Raises:
        RegistryError: there is none.
    """
    with acting.ledger.writing() as writer:
        state = writer.state(task)
        champions = {site: trail[-1] for site, trail in state.trail.items() if trail}
        chosen = [site for site, held in state.profiles.items() if site in (sites or (site,))
                  and site in champions and champions[site].digest in held]  # fmt: skip
        if not chosen or set(sites) - set(chosen):
            raise RegistryError(f"{task} has a profile at: {', '.join(chosen) or 'no site'}.", "")
        for site in chosen:
            body = {"version": champions[site].version, "digest": champions[site].digest, "sites": [site],
                    "number": 1 + len(list_profiles(writer.events(), task, site)), "profile": {},
                    "because": acting.because}  # fmt: skip
            writer.append(Decision.PROFILED, task, body, acting.signer)
    return chosen


def list_profiles(events: list[Event], task: str, site: str) -> list[Event]:
    """Every `profiled` record of a task at a site, oldest first; the first one has number 1."""
    own = (event for event in events if (event.kind, event.task) == (Decision.PROFILED, task))
    return [event for event in own if event.body["sites"] == [site]]


def read_profile(event: Event) -> SiteProfile | None:
    """The profile in a `profiled` record; None where one is taken back, or its maker stored it alone."""
    body = event.body
    if not body["profile"] or body.get("by") in (None, "", event.actor):
        return None
    try:
        return SiteProfile.model_validate(body["profile"])
    except ValidationError:  # whoever signed it, it changes nothing
        return None


def find_numbered(events: list[Event], task: str, site: str, number: int) -> SiteProfile:
    """The profile by its number, for a replay.

    Raises:
        DataError: the ledger has none.
    """
    for event in list_profiles(events, task, site):
        if event.body["number"] == number and (found := read_profile(event)):
            return found
    raise DataError(f"The ledger has no profile {number} of {task} at {site}.", "Restore it from a backup.")


def _check_maker(writer: Writer, draft: Draft) -> None:
    key = writer.trusted_keys().get(draft.key)
    named = key and (key.identity == draft.by or key.attests)
    if not (key and named and check_signature(key.public, draft.message(), draft.signature)):
        raise TrustError(
            f"No trusted key of {draft.by[:64] or 'anybody'} signed this draft as it is.",
            "Make it again: formulary monitoring accept.",
        )
