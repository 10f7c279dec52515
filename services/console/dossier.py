"""What the page of a version shows: a sentence, plots of its signed evidence, lineage and decisions."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from markupsafe import Markup

from imaging.config import Places
from imaging.errors import NotReady
from imaging.vocabulary import Decision, SiteKind, Statement
from registry.events import NETWORK, Event
from registry.evidence import Evidence, flatten, verify_package
from registry.ledger import Ledger
from registry.package import Contract, read_contract, shelf
from registry.policy import Policy, read_policy
from registry.state import State, fold
from services.console.charts import curve, forest, steps
from services.console.views import Books

OVERALL = "all internal"
DRAW = "import sys; from services.console.dossier import write_card; write_card(*sys.argv[1:])"
DRAW_S = 120.0
EXAMPLES = re.compile(r"<svg [^>]*aria-label=\"Golden images.*?</svg>", re.DOTALL)


def read_dossier(books: Books, task: str, version: int, only: str = "") -> dict[str, Any]:
    """Everything the page shows.

    Args:
        books: what is read.
        task: the task.
        version: its number.
        only: a site, of a person who may see no other.

    Raises:
        UnknownVersion: there is none.
        TrustError: the package or a statement does not hold.
    """
    digest, _ = books.ledger.version(task, version)
    folder = shelf(books.places.var, digest)
    evidence, contract = verify_package(folder, books.ledger), read_contract(folder)
    events = [event for event in books.ledger.signed() if event.task == task]
    own = [event for event in events if digest in (event.body.get("digest"), event.body.get("package"))
           or (event.kind in SERVING and event.body.get("version") == version)]  # fmt: skip
    state, policy = fold(events), read_policy(task, books.places.policies)
    asked = [event for event in own if event.kind in (Decision.REQUESTED, Decision.REFUSED)]
    verdict = asked[-1].body["verdict"] if asked else None
    scored = evidence.statements.get(Statement.EVALUATION, {})
    kinds = {name: site.kind for name, site in books.sites.sites.items() if only in ("", name)}
    return {
        "digest": digest, "contract": contract, "verdict": verdict, "sites": list(kinds), "state": state,
        "sentence": say(state, (digest, version), own, list(kinds)), "scored": scored,
        "forests": draw_forests(scored, policy, kinds), "reliability": draw_reliability(scored),
        "robustness": draw_robustness(scored), "lineage": tell_lineage(evidence, contract),
        "params": flatten(evidence.statements[Statement.PACKAGE].get("params", {})),
        "events": [event for event in own if not only or only in event.body.get("sites", (only,))][::-1],
        "signed_by": evidence.signed_by,
    }  # fmt: skip


SERVING = (Decision.ROLLED_BACK, Decision.TRIAL_STARTED, Decision.CHALLENGED)


def say(state: State, which: tuple[str, int], events: list[Event], sites: list[str]) -> str:
    """The first sentence: where it is approved, by whom and when; where not, and why."""
    digest, version = which
    held = [site for site in sites if (trail := state.trail.get(site)) and trail[-1].digest == digest]
    agreed = [event for event in events if event.kind == Decision.APPROVED]
    asked = state.open.get(version)
    if digest in state.retired:
        return f"Version {version} is retired; it never serves again."
    told = f"Version {version} is registered; nobody has asked for it."
    if held and agreed:
        last = agreed[-1]
        told = (f"Serves {len(held)} of {len(sites)} sites ({', '.join(held)}), approved by {last.actor} on "
                f"{last.at[:10]}.")  # fmt: skip
    elif agreed:
        told = f"Version {version} was approved on {agreed[-1].at[:10]} and serves nowhere now."
    elif asked:
        told = f"{asked.actor} asked for version {version} on {asked.at[:10]}; a second person has to agree."
    verdicts = [event.body["verdict"] for event in events if "verdict" in event.body]
    return " ".join([told, *_say_refusals(verdicts[-1] if verdicts else {}, sites)])


def _say_refusals(verdict: dict[str, Any], sites: list[str]) -> list[str]:
    found = verdict.get("sites", {})
    return [f"Refused at {site}: {'; '.join(found[site]['reasons'])}." for site in sites
            if site in found and not found[site]["passed"]]  # fmt: skip


def draw_forests(scored: dict[str, Any], policy: Policy, kinds: dict[str, SiteKind]) -> dict[str, Markup]:
    """Metric -> forest plot by site, of the metrics that the policy bounds and the one that counts most."""
    bounds = {OVERALL: policy.network, SiteKind.INTERNAL: policy.internal, SiteKind.EXTERNAL: policy.external}
    names = dict.fromkeys([*policy.internal.low, *policy.network.low, policy.primary])
    plots = {}
    for name in names:
        rows: dict[str, Any] = {OVERALL: scored.get("overall", {}).get(name)}
        limits = {OVERALL: _limits(policy.network, name)}
        for site, kind in kinds.items():
            label = f"{site} (external)" if kind is SiteKind.EXTERNAL else site
            rows[label] = scored.get("sites", {}).get(site, {}).get(name)
            limits[label] = _limits(bounds[kind], name)
        plots[name] = forest(rows, limits, f"{name.replace('_', ' ')} by site, with intervals and bounds")
    return {name: plot for name, plot in plots.items() if plot}


def _limits(bounds: Any, metric: str) -> list[float]:
    return [bounds.low[metric]] if metric in bounds.low else []


def draw_reliability(scored: dict[str, Any]) -> Markup:
    """Reliability of the internal sites together; empty where the kind has none."""
    told = scored.get("curves", {}).get("overall", {}).get("reliability", [])
    points = [(one["said"], one["share"]) for one in told if one["count"]]
    return curve(points, ("probability said", "share that is positive"), "Reliability, all internal sites")


def draw_robustness(scored: dict[str, Any]) -> list[Markup]:
    """A plot a family of corruption, all on the same axis of scores."""
    families: dict[str, list[Any]] = {}
    for cell in scored.get("robustness", {}).get("cells", []):
        families.setdefault(f"{cell['family']} ({cell['group'].replace('_', ' ')})", []).append(
            (cell["severity"], cell["value"])
        )
    ends = [one[side] for cells in families.values() for _, one in cells for side in ("low", "high")]
    return [steps(cells, (min(ends), max(ends)), name) for name, cells in families.items()]


def tell_lineage(evidence: Evidence, contract: Contract) -> dict[str, str]:
    """What it was made from: name -> value, each from the signed package statement or the contract."""
    told = evidence.statements[Statement.PACKAGE]
    sets = evidence.statements.get(Statement.EVALUATION, {}).get("sets", {})
    changed = " (the tree differed from it)" if told.get("modified") else ""
    return {
        "package": evidence.digest,
        "commit": f"{told.get('commit', 'unknown')}{changed}",
        "dvc.lock": str(told.get("dvc_lock", "absent")),
        **{f"lineage: {name}": str(value) for name, value in contract.lineage.items()},
        **{f"environment: {name}": str(value) for name, value in told.get("environment", {}).items()},
        **{f"locked set: {name}": f"{one['digest']}, {one['images']} images of {one['subjects']} subjects"
           for name, one in sets.items()},
    }  # fmt: skip


class Cards:
    """Model cards as pages: drawn once for each state of a task, one at a time, by a process of its own.

    Args:
        places: where packages lie and cards are kept.
    """

    def __init__(self, places: Places) -> None:
        self._places, self._folder = places, places.var / "console"
        self._pen = ThreadPoolExecutor(1, thread_name_prefix="card")
        self._drawing: dict[Path, Future[None]] = {}
        self._lock = threading.Lock()

    def find(self, ledger: Ledger, task: str, version: int) -> str | None:
        """The card; None while it is being drawn, which begins where nobody has asked for it yet.

        Raises:
            UnknownVersion: there is none.
            NotReady: it could not be drawn; the log says why. Whoever asks again has it tried again.
        """
        digest, _ = ledger.version(task, version)
        last = max(event.seq for event in ledger.signed() if event.task in (task, NETWORK))
        path = self._folder / f"card-{digest.removeprefix('sha256:')[:16]}-{last}.html"
        with self._lock:
            drawing = self._drawing.get(path)
            if drawing and drawing.done():
                self._drawing.pop(path).result()
            with contextlib.suppress(FileNotFoundError):
                return path.read_text()
            if path not in self._drawing:
                self._drawing[path] = self._pen.submit(self._draw, path, task, version)
        return None

    def _draw(self, path: Path, task: str, version: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name, last = path.stem.rsplit("-", 1)
        with (self._folder / f"{name}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may draw it
            if path.exists():
                return
            draft = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.draft")
            try:
                self._run(task, version, draft)
                draft.rename(path)
            finally:
                draft.unlink(missing_ok=True)
            for old in self._folder.glob(f"{name}-*.html"):
                if int(old.stem.rsplit("-", 1)[1]) < int(last):
                    old.unlink(missing_ok=True)

    def _run(self, task: str, version: int, draft: Path) -> None:
        told = {"FORMULARY_ROOT": str(self._places.root), "FORMULARY_BUILD": str(self._places.build),
                "FORMULARY_VAR": str(self._places.var), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # fmt: skip
        command = ["nice", sys.executable, "-c", DRAW, task, str(version), str(draft)]
        try:
            subprocess.run(command, env={**os.environ, **told}, timeout=DRAW_S, check=True)
        except subprocess.SubprocessError as error:
            raise NotReady(
                f"The card of {task} v{version} could not be drawn.",
                f"The log of the service says why; try: formulary registry card {task} {version}",
            ) from error


def write_card(task: str, version: str, path: str) -> None:
    """Draw a card into a file: matplotlib and an engine, which the serving process does without."""
    from imaging.config import read_places
    from registry.card import present
    from registry.ledger import open_ledger

    places = read_places()
    policy = read_policy(task, places.policies)
    Path(path).write_text(present(open_ledger(places.var), places.var, policy, int(version)))


def find_examples(card: str) -> str:
    """The card's drawing of examples with heat maps, as SVG; empty where it has none."""
    found = EXAMPLES.search(card)
    return found.group().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) if found else ""
