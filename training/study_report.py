"""The study as a page, docs/study.md, and its pictures: written from stored results, never by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from imaging.config import Places
from imaging.errors import DataError
from training.claims import Notes, find_seconds, judge
from training.study import Claim, Study, claim_folder

TEMPLATE = Path(__file__).parent / "templates" / "study.md.j2"
COLOURS = ("#2a5d84", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def report_study(places: Places, study: Study, unfinished: bool = False) -> dict[str, str]:
    """Judge every claim, and write docs/study.md, docs/pictures/study/ and build/study/verdicts.json.

    Args:
        places: where the answers lie.
        study: with the claims.
        unfinished: leave out claims that have not run, and say on the page which.

    Returns:
        Name of the claim -> verdict.

    Raises:
        DataError: a claim has not run.
    """
    from jinja2 import Environment, StrictUndefined

    claims, waiting = {}, []
    for name, claim in study.claims.items():
        if unfinished and not (claim_folder(places, name) / "runs.json").exists():
            waiting.append(claim.sentence)
            continue
        told = judge_stored(study, name, claim_folder(places, name))
        told["arms"] = [describe_arm(claim, variant, told["runs"]) for variant in claim.variants]
        claims[name] = told
        _plot(places.root / "docs" / "pictures" / "study" / f"{name}.svg", claims[name])
    verdicts = {name: {key: told[key] for key in ("verdict", "rows")} for name, told in claims.items()}
    (places.build / "study" / "verdicts.json").write_text(json.dumps(verdicts, indent=1) + "\n")
    page = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    page.filters |= {"number": write_number}
    text = page.from_string(TEMPLATE.read_text()).render(study=study, claims=claims, waiting=waiting)
    (places.root / "docs" / "study.md").write_text(text)
    return {name: told["verdict"] for name, told in claims.items()}


def judge_stored(study: Study, name: str, folder: Path) -> dict[str, Any]:
    """The claim, what its folder tells (cohort, runs), and what `training.claims.judge` says."""
    import pandas as pd

    if not (folder / "runs.json").exists():
        raise DataError(f"The claim {name} has not run.", f"Run `formulary training study run {name}`.")
    told, claim = json.loads((folder / "runs.json").read_text()), study.claim(name)
    answers = pd.read_parquet(folder / "answers.parquet")
    return {"claim": claim, **told, **judge(claim, told["runs"], answers, study.confidence)}


def write_number(row: dict[str, Any]) -> str:
    """An estimate with its interval, or why there is none."""
    if "reason" in row:
        return str(row["reason"])
    return f"{row['estimate']:.3f} [{row['low']:.3f} {row['high']:.3f}]"


def describe_arm(claim: Claim, variant: str, runs: Notes) -> dict[str, Any]:
    """What a variant was, and what its runs took: means over seeds, and the least and the most."""
    own = [run for run in runs if run["variant"] == variant]
    how, network = own[0]["fit"], own[0]["fit"]["architecture"]
    target = next((row.target for row in claim.rows if row.target), float("inf"))
    spent = [run["cpu_seconds"] for run in own]
    reached = zip((find_seconds(run, target) for run in own), spent, strict=True)
    scores = [max(epoch["validation_score"] or 0 for epoch in run["epochs"]) for run in own]
    facts = {
        "variant": variant,
        "epochs": how["epochs"],
        "parameters": own[0]["parameters"],
        "seeds": len(own),
    }
    times = ", ".join(f"{s:.0f}" if np.isfinite(s) else f"over {whole:.0f}" for s, whole in reached)
    return {
        **facts, "pretrained": bool(network["pretrained"]), "augmented": any(how["augmentation"].values()),
        "architecture": network["name"] + f" + {network['attention']}".replace(" + none", ""),
        "subjects": _span([run["subjects"] for run in own], 0), "cpu_seconds": _span(spent, 0),
        "score": _span(scores, 3), "reached": times if np.isfinite(target) else "",
    }  # fmt: skip


def _span(values: list[float], digits: int) -> str:
    low, middle, high = (f"{each:.{digits}f}" for each in (min(values), np.mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _plot(path: Path, told: dict[str, Any]) -> None:
    """The picture of a claim, as SVG, the same bytes for the same results."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    claim: Claim = told["claim"]
    rows = [
        (row, shown) for row, shown in zip(claim.rows, told["rows"], strict=True) if "reason" not in shown
    ]
    figure = Figure(
        figsize=(8, 3.6 if claim.plot != "forest" else 0.8 + 0.3 * len(rows)), layout="constrained"
    )
    {"forest": _plot_forest, "course": _plot_course, "growth": _plot_growth}[claim.plot](
        figure.subplots(), rows, told
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "formulary", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _plot_forest(axes: Any, rows: list[Any], told: dict[str, Any]) -> None:
    """Estimates and intervals; a bar is what was asked."""
    for place, (row, shown) in enumerate(reversed(rows)):
        axes.plot([shown["low"], shown["high"]], [place, place], color=COLOURS[0])
        axes.plot(shown["estimate"], place, "o", color=COLOURS[0])
        if row.above is not None:
            axes.plot([row.above] * 2, [place - 0.35, place + 0.35], color=COLOURS[1], linewidth=2.5)
    axes.set_yticks(range(len(rows)), [shown["what"] for _, shown in reversed(rows)], fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _plot_course(axes: Any, rows: list[Any], told: dict[str, Any]) -> None:
    """Validation score after each epoch against CPU-seconds, a line a run."""
    for colour, variant in zip(COLOURS, told["claim"].variants, strict=False):
        for number, run in enumerate(run for run in told["runs"] if run["variant"] == variant):
            scored = [epoch for epoch in run["epochs"] if epoch["validation_score"] is not None]
            x, y = zip(*((e["cpu_seconds"], e["validation_score"]) for e in scored), strict=True)
            axes.plot(x, y, "-o", color=colour, markersize=3, label=None if number else variant)
    for target in {row.target for row in told["claim"].rows if row.target}:
        axes.axhline(target, color="black", linestyle="dashed", linewidth=1)
    axes.set(xlabel="CPU-seconds of training", ylabel="validation score")
    axes.legend(fontsize=8)


def _plot_growth(axes: Any, rows: list[Any], told: dict[str, Any]) -> None:
    """Estimates against training subjects, a line a set."""
    sizes = {run["variant"]: run["subjects"] for run in told["runs"]}
    alone = [(row, shown) for row, shown in rows if not row.against and row.of in sizes]
    for colour, where in zip(COLOURS, dict.fromkeys(row.where for row, _ in alone), strict=False):
        kept = {sizes[row.of]: shown for row, shown in alone if row.where == where}
        middle, *ends = ([kept[size][name] for size in sorted(kept)] for name in ("estimate", "low", "high"))
        lengths = np.abs(np.array(ends) - middle)
        axes.errorbar(sorted(kept), middle, lengths, color=colour, marker="o", capsize=3, label=where)
    axes.set(xlabel="training subjects", ylabel="estimate", xscale="log")
    axes.set_xticks(sorted(sizes.values()), [str(size) for size in sorted(sizes.values())])
    axes.minorticks_off()
    axes.legend(fontsize=8)
