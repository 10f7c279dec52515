"""The model card: CHAI's Applied Model Card, filled from signed statements and ledger events, fact by fact.

What is said and where it comes from is data: `templates/card.yaml`. A source is a document and a JSON pointer
(RFC 6901) into it: `evaluation#/sites/north/auc`, `ledger/7#/body/sites`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from imaging.errors import DataError, TrustError
from imaging.vocabulary import Decision, Kind, Slot, Statement
from registry.card_plots import render_card
from registry.events import NETWORK, Event, canonical
from registry.evidence import CITING, Evidence, verify_package
from registry.ledger import Ledger
from registry.package import Contract, read_contract, shelf
from registry.policy import Policy
from registry.state import State, fold

TEMPLATES = Path(__file__).parent / "templates"
OPEN = {"open": "No signed statement and no ledger event says it."}
PLACING = (Decision.APPROVED, Decision.CHALLENGED, Decision.ROLLED_BACK, Decision.SUSPENDED, Decision.RESUMED)


def present(ledger: Ledger, var: Path, policy: Policy, version: int, as_json: bool = False) -> str:
    """The card of a registered version, as a page that needs no network or as JSON.

    Args:
        ledger: what was decided.
        var: where packages are kept.
        policy: of the task.
        version: its number.
        as_json: JSON instead of HTML.

    Raises:
        UnknownVersion: there is none.
        TrustError: the package, a statement or the ledger does not hold.
        DataError: as `build_card`.
    """
    digest, _ = ledger.version(policy.task, version)
    folder = shelf(var, digest)
    decisions = [event for event in ledger.signed() if event.task == policy.task]
    card = build_card(verify_package(folder, ledger), read_contract(folder), decisions, policy)
    return json.dumps(card, indent=1, ensure_ascii=False) if as_json else render_card(card, folder)


def build_card(
    evidence: Evidence, contract: Contract, decisions: list[Event], policy: Policy
) -> dict[str, Any]:
    """The card as JSON.

    Args:
        evidence: of the package, its signatures checked.
        contract: of the package.
        decisions: every event of the task, oldest first, their signatures checked.
        policy: of the task; its bounds are shown beside the scores.

    Returns:
        Fields of CHAI's schema 0.2, the trees behind the plots (`Figures`), where it serves (`Standing`), its
        uses of locked sets, its decisions and the reporting checklists. A fact is {value[, low, high,
        subjects, ...], source}; a fixed sentence {text}; what nothing says {open}.

    Raises:
        DataError: a number has no source, or its source says another; a field of the schema is missing.
        TrustError: the ledger has not registered the package.
    """
    table = yaml.safe_load((TEMPLATES / "card.yaml").read_text())
    own = [event for event in decisions if event.body.get("digest") == evidence.digest]
    sources = gather(table, evidence, contract, policy, decisions)
    sources.names.update(_name_events(own, evidence.digest))
    state = fold(decisions)
    card = {section: _fill(told, sources) for section, told in table["fields"].items()}
    card["ReleaseInfo"]["ReleaseStage"] = [{"text": table["stages"][_tell_stage(state, evidence.digest)]}]
    who = {evidence.signed_by.get(kind) for kind in (Statement.PACKAGE, Statement.EVALUATION)}
    card["Notices"] = _fill([*table["notices"], table["authors"][len(who)]], sources)
    card["Figures"] = {**_cite_all(table["figures"], sources), "Kinds": _tell_kinds(sources)}
    card["Standing"] = _stand(state, evidence.digest, decisions, sources)
    used = [event for event in own if event.kind == Decision.TEST_SET_USED]
    card["Uses"] = [sources.cite(f"ledger/{event.seq}#/body") for event in used]
    card["Decisions"] = [
        _cite_all({name: f"ledger/{event.seq}#{where}" for name, where in table["event"].items()}, sources)
        for event in decisions
        if event in own or event.kind in PLACING
    ]
    card["Checklists"] = {name: {number: _tick(item, sources) for number, item in items.items()}
                          for name, items in table["checklists"].items()}  # fmt: skip
    check_schema(card)
    check_sources(card, sources)
    return card


@dataclass(frozen=True)
class Sources:
    """What facts may come from.

    Attributes:
        documents: name -> JSON; of an event `ledger/SEQ`.
        names: what card.yaml calls an event -> its document's name.
    """

    documents: dict[str, Any]
    names: dict[str, str]

    def real(self, source: str) -> str:
        """The source with an event's own name, and the task's."""
        name, _, pointer = source.partition("#")
        return f"{self.names.get(name, name)}#{pointer.replace('{task}', self.documents['contract']['task'])}"

    def find(self, source: str) -> Any:
        """What stands there.

        Raises:
            DataError: no such document, or nothing stands there.
        """
        name, _, pointer = source.partition("#")
        try:
            found = self.documents[name]
            for step in pointer.split("/")[1:]:
                key = _unescape(step)
                found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"The card's source {source} leads nowhere.", "Mend card.yaml.") from error
        return found

    def has(self, source: str) -> bool:
        """Whether something stands there."""
        try:
            return self.find(source) not in ("", {})
        except DataError:
            return False

    def cite(self, source: str) -> Any:
        """What stands there as facts: each estimate, scalar or list of scalars {value, ..., source}."""
        found = self.find(source)
        if isinstance(found, dict) and "estimate" not in found:
            return {key: self.cite(f"{source}/{_escape(key)}") for key in found}
        if isinstance(found, list) and any(isinstance(item, dict) for item in found):
            return [self.cite(f"{source}/{number}") for number in range(len(found))]
        return {**tell_fact(found), "source": source}


def tell_fact(found: Any) -> dict[str, Any]:
    """What a fact says of what stands at its source."""
    if isinstance(found, dict) and "estimate" in found:
        return {"value": found["estimate"], **{key: found[key] for key in found if key != "estimate"}}
    return {"value": found}


def check_sources(node: Any, sources: Sources, where: str = "card") -> None:
    """Hold every number of a card, and every text with a figure in it, to its source.

    Args:
        node: the card, or a part of it.
        sources: what it may come from.
        where: of the part, for the error.

    Raises:
        DataError: there is no source, it leads nowhere, or it says something else.
    """
    if isinstance(node, dict) and "source" in node:
        _hold(node, sources, where)
    elif isinstance(node, dict | list):
        for key, part in node.items() if isinstance(node, dict) else enumerate(node):
            check_sources(part, sources, f"{where}/{key}")
    elif not isinstance(node, bool | None) and (not isinstance(node, str) or any(map(str.isdigit, node))):
        raise DataError(f"{where} says {node!r} without a source.", "Cite where it stands: card.yaml.")


def _hold(node: dict[str, Any], sources: Sources, where: str) -> None:
    found = sources.find(str(node["source"]))
    name = _unescape(str(node["source"]).rsplit("/", 1)[-1]).replace("_", " ")
    # A label may end in the name of what it cites: "hausdorff95 mm" is no number.
    check_sources(str(node.get("label", "")).removesuffix(name), sources, f"{where}/label")
    told = {key: part for key, part in node.items() if key not in ("source", "label")}
    if told and canonical(told) != canonical(tell_fact(found)):
        raise DataError(
            f"{where} says {told}, its source {node['source']} says {found!r}.", "Build it again."
        )


def check_schema(card: dict[str, Any]) -> None:
    """Hold a card to `templates/card.schema.json`.

    Raises:
        DataError: a field is missing, unknown or of another form.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    schema = json.loads((TEMPLATES / "card.schema.json").read_text())
    error = best_match(Draft202012Validator(schema).iter_errors(card))
    if error:
        raise DataError(f"The card's {error.json_path} is wrong: {error.message[:200]}.", "Mend card.yaml.")


def gather(
    table: dict[str, Any], evidence: Evidence, contract: Contract, policy: Policy, events: list[Event]
) -> Sources:
    """The documents that facts may come from; `table` is card.yaml."""
    # A segmentation has no operating point: its threshold is a default that means nothing.
    promised = contract.model_dump(
        mode="json", exclude={"threshold"} if contract.kind is Kind.SEGMENTATION else None
    )
    documents = {**evidence.statements, "signed_by": evidence.signed_by, "contract": promised,
                 "policy": policy.model_dump(mode="json"), "table": table}  # fmt: skip
    return Sources({**documents, **{f"ledger/{event.seq}": vars(event) for event in events}}, {})


def _name_events(own: list[Event], digest: str) -> dict[str, str]:
    """What card.yaml calls an event -> the document of the last such event."""
    kinds = {"approved": [Decision.APPROVED], "asked": [Decision.REQUESTED, Decision.REFUSED],
             "registered": [Decision.REGISTERED], "cited": CITING}  # fmt: skip
    names = {
        name: f"ledger/{event.seq}" for name, which in kinds.items() for event in own if event.kind in which
    }
    if "registered" not in names:
        raise TrustError(f"The package {digest[:19]} is not in the ledger.", "Register it first.")
    return names


def _fill(told: Any, sources: Sources) -> Any:
    """Lines of card.yaml as entries, in every field of a section."""
    if isinstance(told, dict):
        return {name: _fill(part, sources) for name, part in told.items()}
    return [entry for line in told for entry in _read_line(line, sources)] or [OPEN]


def _read_line(line: str | dict[str, str], sources: Sources) -> Iterator[dict[str, Any]]:
    label, told = next(iter(line.items())) if isinstance(line, dict) else ("", line)
    if "#/" not in told:
        yield {"open" if label == "open" else "text": told}
        return
    source = sources.real(told).removesuffix("/*")
    if not sources.has(source):
        return
    keys = list(sources.find(source)) if told.endswith("/*") else [""]
    for key in keys:
        fact = sources.cite(f"{source}/{_escape(key)}" if key else source)
        named = f"{label} {key.replace('_', ' ')}".strip()
        yield {"label": named, **fact} if named else fact


def _cite_all(told: Any, sources: Sources) -> dict[str, Any]:
    """Trees for plots and tables; what no statement says is absent."""
    trees = {name: _cite_all(part, sources) if isinstance(part, dict) else sources.real(part)
             for name, part in told.items()}  # fmt: skip
    return {name: part if isinstance(part, dict) else sources.cite(part)
            for name, part in trees.items() if isinstance(part, dict) or sources.has(part)}  # fmt: skip


def _tell_kinds(sources: Sources) -> dict[str, Any]:
    """Site -> the split (test or external) that its images were scored in."""
    rows = sources.documents.get(Statement.EVALUATION, {}).get("predictions", [])
    last = {row["site"]: number for number, row in enumerate(rows)}
    return {site: sources.cite(f"evaluation#/predictions/{number}/split") for site, number in last.items()}


def _tick(item: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """An item of a checklist: filled where all its pointers lead somewhere."""
    by = [sources.real(source) for source in item.get("by", [])]
    if by and all(sources.has(source) for source in by):
        return {"name": item["name"], "filled": True, "by": [{"source": source} for source in by]}
    return {"name": item["name"], "filled": False}


def _stand(state: State, digest: str, decisions: list[Event], sources: Sources) -> dict[str, dict[str, Any]]:
    """Site -> the slot that this version holds there, whether the site is suspended, and since when."""
    seq = {event.at: event.seq for event in decisions if event.kind in PLACING}
    return {
        site: {"slot": str(slot), "suspended": state.stopped(site) is not None,
               "since": sources.cite(f"ledger/{seq[placed.since]}#/at")}
        for site, slots in state.slots().items() if site != NETWORK
        for slot, placed in slots.items() if placed.digest == digest
    }  # fmt: skip


def _tell_stage(state: State, digest: str) -> str:
    """The stage of its life, as card.yaml names it."""
    held = {slot for slots in state.slots().values() for slot, one in slots.items() if one.digest == digest}
    if digest in state.retired:
        return "retired"
    return next((str(slot) for slot in (Slot.CHAMPION, Slot.CHALLENGER) if slot in held), "registered")


def _escape(key: str) -> str:
    """A key as a step of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


def _unescape(step: str) -> str:
    return step.replace("~1", "/").replace("~0", "~")
