"""MLflow held to the ledger: versions, aliases and what was decided of them; what differs is an incident.

The ledger alone decides. A foreign alias is never served; it is recorded once, and put right where the policy
says so. The only memory beside MLflow is var/mlflow/findings.json: what was found and is not right yet.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from imaging.config import Places
from imaging.errors import FormularyError, RegistryError
from imaging.vocabulary import Decision
from registry.events import NETWORK
from registry.evidence import verify_package
from registry.guardian import DIGEST, is_protected
from registry.ledger import Ledger
from registry.package import shelf
from registry.policy import read_policy
from registry.store import describe_decisions, log_version, mirroring

Finding = dict[str, Any]  # "fact", a sentence, and what it is about


def drain(places: Places, ledger: Ledger) -> list[str]:
    """Make MLflow say what the ledger says, of every task; outbox rows are settled once it does.

    Returns:
        What was found and what was done, a sentence each, e.g. `brain-tissue@champion = v2`. What the policy
        leaves as it is, is told each time.

    Raises:
        RegistryError: MLflow does not answer, or cannot be put right; all else was done, and the rows of what
            was not stay pending.
        TrustError: a package or the ledger does not hold.
    """
    rows = ledger.pending()
    with mirroring(places.var) as client:
        poll = Poll(client, places, ledger)
        done = {task for task in sorted({name for name, _, _, _ in ledger.versions()}) if poll.agree(task)}
    for row, task, _, _ in rows:
        if task in done:
            ledger.settle(row)
    return poll.close()


def mirror_versions(places: Places, ledger: Ledger, task: str) -> list[int]:
    """As `drain`, of one task, and settles nothing.

    Returns:
        Numbers of the versions that MLflow lacked.
    """
    with mirroring(places.var) as client:
        poll = Poll(client, places, ledger)
        poll.agree(task)
    poll.close()
    return poll.logged


def expected_aliases(ledger: Ledger, task: str) -> dict[str, int]:
    """Alias -> version, of every slot of a task: `champion`, `previous--site-c` (MLflow refuses @)."""
    return {
        str(slot) if site == NETWORK else f"{slot}--{site}": placement.version
        for site, held in ledger.slots(task).items()
        for slot, placement in held.items()
    }


@dataclass(frozen=True)
class View:
    """A task in the ledger and in MLflow.

    Attributes:
        wanted: alias -> version, by the ledger.
        digests: version -> package digest, by the ledger.
        decided: versions that were ever given a slot.
        due: the outbox holds a move of this task that MLflow may not have seen.
        exists: whether MLflow has a registered model of this name.
        aliases: alias -> version, in MLflow.
        versions: version -> MLflow's ModelVersion.
    """

    task: str
    wanted: dict[str, int]
    digests: dict[int, str]
    decided: set[int]
    due: bool
    exists: bool
    aliases: dict[str, int]
    versions: dict[int, Any]

    @property
    def missing(self) -> list[int]:
        """Versions of the ledger that MLflow lacks, or whose number holds something else."""
        return [number for number, digest in sorted(self.digests.items()) if self._told(number) != digest]

    def moves(self) -> list[str]:
        """Protected aliases that are not where the ledger has them."""
        names = self.wanted.keys() | {alias for alias in self.aliases if is_protected(alias)}
        return sorted(name for name in names if self.aliases.get(name) != self.wanted.get(name))

    def find(self) -> list[Finding]:
        """What neither the ledger nor a mirror that is behind explains."""
        return [*self._find_versions(), *self._find_aliases()]

    def _told(self, number: int) -> str | None:
        """The digest that MLflow shows for a version; None where it shows none."""
        found = self.versions.get(number)
        return found.tags.get(DIGEST) if found else None

    @property
    def lost(self) -> list[int]:
        """Versions that MLflow had and lacks: they are in a slot that it knew, or later ones are there."""
        placed = set() if self.due else set(self.wanted.values())
        last = max(self.versions, default=0)
        return [n for n in sorted(self.digests) if n not in self.versions and (n in placed or n < last)]

    @property
    def appendable(self) -> bool:
        """Whether the missing versions come next in MLflow, or there is nothing before them."""
        last = max(self.versions, default=0)
        return not self.exists or (not self.lost and self.missing[0] > last)

    def miss(self, number: int) -> Finding:
        """That MLflow lacks a version that it had."""
        return {"fact": f"MLflow does not hold {self.task} v{number} any more.", "version": number}

    def _find_versions(self) -> list[Finding]:
        found = [self.miss(number) for number in self.lost]
        for number in sorted(self.versions):
            name = f"{self.task} v{number}"
            if number not in self.digests or self._told(number) is None:
                fact = f"MLflow holds {name}, which the ledger does not know."
                found.append({"fact": fact, "version": number})
            elif number in self.missing:
                found.append({"fact": f"MLflow holds another package as {name}.", "version": number})
        return found

    def _find_aliases(self) -> list[Finding]:
        found = []
        for alias in self.moves():
            is_at, belongs = self.aliases.get(alias), self.wanted.get(alias)
            behind = self.due and (is_at is None or is_at in self.decided)
            if not behind and (belongs is None or self._told(belongs)):
                at, to = (f"v{number}" if number else "nothing" for number in (is_at, belongs))
                fact = f"MLflow's alias {alias} of {self.task} points at {at}; the ledger says {to}."
                found.append({"fact": fact, "alias": alias, "found": is_at, "expected": belongs})
        return found


class Poll:
    """One comparison of MLflow with the ledger; `logged` are the versions that MLflow lacked."""

    def __init__(self, client: Any, places: Places, ledger: Ledger) -> None:
        self._client, self._places, self._ledger = client, places, ledger
        self._file = places.var / "mlflow" / "findings.json"
        self._known: dict[str, list[Finding]] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )
        self._told: list[str] = []
        self._problems: list[FormularyError] = []
        self.logged: list[int] = []

    def agree(self, task: str) -> bool:
        """Compare a task and put it right; False when that failed, which `close` raises."""
        view = self._look(task)
        found = view.find()
        for finding in found:
            self._record(task, finding)
        self._remember(task, found)
        try:
            self._repair(view, found)
        except FormularyError as error:
            self._problems.append(error)
            return False
        finally:
            if found:
                self._tell(task, found)
        return True

    def close(self) -> list[str]:
        """What was found and done.

        Raises:
            FormularyError: the first problem, with everything that was found and done.
        """
        if self._problems:
            first = self._problems[0]
            facts = [*self._told, *(problem.fact for problem in self._problems)]
            raise type(first)(" ".join(facts), first.fix)
        return self._told

    def _look(self, task: str) -> View:
        wanted = expected_aliases(self._ledger, task)
        digests = {number: digest for _, number, digest, _ in self._ledger.versions(task)}
        given = (Decision.APPROVED, Decision.CHALLENGED)
        decided = {event.body["version"] for event in self._ledger.events(task) if event.kind in given}
        # read after the slots: a move in between is no stranger's
        due = task in {row[1] for row in self._ledger.pending()}
        models = self._client.search_registered_models(f"name = '{task}'")
        aliases = {alias: int(number) for model in models for alias, number in model.aliases.items()}
        listed = self._client.search_model_versions(f"name = '{task}'", max_results=1000)
        versions = {int(found.version): found for found in listed}
        return View(task, wanted, digests, decided, due, bool(models), aliases, versions)

    def _record(self, task: str, finding: Finding) -> None:
        if finding not in self._known.get(task, []):
            self._ledger.record_incident(finding["fact"], task, finding, "mirror")

    def _tell(self, task: str, found: list[Finding]) -> None:
        left = [finding for finding in self._look(task).find() if finding in found]
        self._remember(task, left)
        for finding in found:
            self._told.append(f"{finding['fact']} It was {'left so' if finding in left else 'put right'}.")

    def _remember(self, task: str, findings: list[Finding]) -> None:
        if findings != self._known.get(task, []):
            self._known[task] = findings
            self._file.write_text(json.dumps(self._known))

    def _repair(self, view: View, found: list[Finding]) -> None:
        left = {finding.get("alias") for finding in found if not self._reverts(view.task)}
        self._align(view, left)
        if view.missing and (relabelled := self._relabel(view)).missing:
            self._fill(relabelled, found)
        if view.missing:
            self._align(self._look(view.task), left)

    def _relabel(self, view: View) -> View:
        """Put the digest back on versions whose logged model still has it; what MLflow shows then."""
        from mlflow.exceptions import MlflowException

        for number in view.versions.keys() & set(view.missing):
            model, digest = view.versions[number].source.removeprefix("models:/"), view.digests[number]
            with contextlib.suppress(MlflowException):  # no such model
                if self._client.get_logged_model(model).tags.get(DIGEST) == digest:
                    self._client.set_model_version_tag(view.task, str(number), DIGEST, digest)
        return self._look(view.task)

    def _reverts(self, task: str) -> bool:
        return read_policy(task, self._places.policies).foreign_alias == "revert"

    def _align(self, view: View, left: set[str | None]) -> None:
        """Set aliases, but those that are left as they are, and tags."""
        for alias in view.moves():
            number = view.wanted.get(alias)
            if alias in left or (number and number in view.missing):
                continue
            if number:
                self._client.set_registered_model_alias(view.task, alias, str(number))
            else:
                self._client.delete_registered_model_alias(view.task, alias)
            self._told.append(f"{view.task}@{alias} = {f'v{number}' if number else 'nothing'}")
        for number, tags in describe_decisions(self._ledger, view.task).items():
            if number in view.missing:
                continue
            version = view.versions[number]
            changed = {key: value for key, value in tags.items() if version.tags.get(key) != value}
            for key, value in changed.items():
                self._client.set_model_version_tag(view.task, str(number), key, value)
            if changed:
                self._client.set_logged_model_tags(version.source.removeprefix("models:/"), changed)

    def _fill(self, view: View, found: list[Finding]) -> None:
        """Log what MLflow lacks. It gives no number twice, so a gap is filled by making the model anew."""
        if view.appendable:
            lost = next((number for number in view.missing if not self._log(view, number)), None)
            if lost is None:
                return
            found.append(view.miss(lost))  # MLflow gave another number: this one was deleted
            self._record(view.task, found[-1])
        if not self._reverts(view.task):
            raise RegistryError(
                f"MLflow gives {view.task} v{view.missing[0]} no number any more: it is gone or another's.",
                "Let the policy say `foreign_alias: revert`, or move var/mlflow aside; then run "
                "`formulary registry mirror`.",
            )
        for digest in view.digests.values():  # before anything is taken away
            verify_package(shelf(self._places.var, digest), self._ledger)
        old = self._client.get_registered_model(view.task)
        self._client.delete_registered_model(view.task)  # runs, logged models and artefacts stay
        self._client.create_registered_model(view.task, old.tags, old.description)
        for number in sorted(view.digests):
            self._log(view, number)
        for alias, number in old.aliases.items():
            if int(number) in view.digests and not is_protected(alias):
                self._client.set_registered_model_alias(view.task, alias, str(number))

    def _log(self, view: View, number: int) -> bool:
        """Log a version, or make it anew of what MLflow still has; whether it got its number."""
        package = shelf(self._places.var, view.digests[number])
        logged = None if number in view.missing else view.versions[number]
        evidence = verify_package(package, self._ledger)
        if log_version(self._client, package, evidence, number, logged) != number:
            return False
        self.logged += [number] * (logged is None)
        return True
