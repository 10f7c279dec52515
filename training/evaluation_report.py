"""The evaluation as a page: forest plots, reliability, FROC, robustness, and images right and wrong."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.detection import STRIDE, find_lesions
from imaging.image import middle, show_image
from imaging.vocabulary import Kind, Split
from registry.package import Contract
from training.datasets import Dataset
from training.robustness import list_robustness

TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"
MEANT = {"right": "Share of right answers", "dice": "Dice", "found": "Share of lesions found"}
UNPLOTTED = ("brier", "calibration", "surface", "hausdorff")  # in the tables alone: on other scales


def write_report(path: Path, contract: Contract, body: dict[str, Any], cases: Cases) -> None:
    """Write the page; pictures are inside it, and no network is needed to read it.

    Args:
        path: of the page.
        contract: of the package.
        body: of the evaluation statement.
        cases: the images, and the engine's answers and heat, in the same order.
    """
    from jinja2 import Environment

    sites = {"overall": body["overall"], **body["sites"]}
    subgroups = {
        f"{column.replace('_', ' ')} {value}": told
        for column, values in body["subgroups"].items()
        for value, told in values.items()
    }
    names = list(body["overall"])
    shown = [name for name in names if not name.startswith(UNPLOTTED)]
    external = {row["site"] for row in body["predictions"] if row["split"] == Split.EXTERNAL}
    chosen, caption = choose_examples(contract, body)
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text()).render(
        contract=contract, body=body, names=names, sentence=tell(contract, body), caption=caption,
        tables={"site": sites, "subgroup": subgroups}, external=sorted(external),
        forests={"site": plot_forest(sites, shown, external),
                 "subgroup": plot_forest(subgroups, shown, set()) if subgroups else ""},
        curves=plot_curves(body["curves"], external) if any(body["curves"].values()) else "",
        meant=MEANT, robustness=list_robustness(body["robustness"]) if "robustness" in body else [],
        examples=plot_examples(contract, cases, chosen),
        methods=list_methods({**sites, **subgroups, "gap": body["gap"]}),
    )  # fmt: skip
    path.write_text(page)


def tell(contract: Contract, body: dict[str, Any]) -> str:
    """What was found, in one sentence of plain words."""
    overall, subjects = body["overall"], body["sets"].get(Split.TEST, {}).get("subjects", 0)

    def of_hundred(name: str) -> str:
        low, middle, high = (round(100 * overall[name][end]) for end in ("low", "estimate", "high"))
        return f"{middle} ({low} to {high})"

    if contract.kind is Kind.CLASSIFICATION:
        found = (
            f"of 100 positive images it calls {of_hundred('sensitivity')} positive, and of 100 negative ones "
            f"{of_hundred('specificity')} negative"
        )
    elif contract.kind is Kind.DETECTION:
        found = f"of 100 lesions it finds {of_hundred('lesion_sensitivity')}"
        if "false_positives" in overall:
            found += f", with {overall['false_positives']['estimate']:.2f} false marks an image"
    else:
        found = f"what it outlines and the truth overlap by {of_hundred('dice')} in 100 (Dice)"
    gaps = [(gap["estimate"], name, gap) for name, gap in body["gap"].items()]
    if not gaps:
        return f"On {subjects} subjects that it never saw, {found}."
    size, name, gap = max(gaps, key=lambda item: item[:2])
    if size < 0.005:
        return f"On {subjects} subjects that it never saw, {found}; no site did worse than another."
    return (
        f"On {subjects} subjects that it never saw, {found}; between sites its {name.replace('_', ' ')} "
        f"differs by up to {size:.2f}, from {gap['worst']} (worst) to {gap['best']} (best)."
    )


def list_methods(rows: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """How intervals were made -> the metrics whose intervals were made so."""
    found: dict[str, set[str]] = {}
    for row, told in rows.items():
        for name, score in told.items():
            found.setdefault(score["method"], set()).add(f"gap of {name}" if row == "gap" else name)
    return {method: sorted(name.replace("_", " ") for name in found[method]) for method in sorted(found)}


Cases = tuple[Dataset, NDArray[np.float32], NDArray[np.float32]]
COUNT = 4  # examples, or plots, in a row
INTERNAL, EXTERNAL = ("#2a5d84", "o"), ("#d55e00", "s")  # told apart by colour-blind eyes, and by form
COLOURS = ("#56b4e9", "#e69f00", "#cc79a7")


def plot_forest(rows: dict[str, Any], names: list[str], external: set[str]) -> str:
    """Estimates and intervals: a line a row of the table, a plot a metric; rows that lack it stay empty."""
    lines = -(-len(names) // COUNT)
    size = (3.1 * min(COUNT, len(names)), lines * (0.3 * len(rows) + 1.0))
    figure, axes = _figure(lines * min(COUNT, len(names)), size, lines)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for number, (axis, name) in enumerate(zip(axes, names, strict=False)):
        for place, (row, told) in enumerate(reversed(rows.items())):
            if score := told.get(name):
                colour, form = EXTERNAL if row in external else INTERNAL
                axis.plot([score["low"], score["high"]], [place, place], color=colour)
                axis.plot(score["estimate"], place, form, color=colour)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        first = number % COUNT == 0
        axis.set_yticks(range(len(rows)), list(reversed(rows)) if first else [""] * len(rows))
        axis.grid(axis="x", alpha=0.3)
    return _inline(figure)


def plot_curves(curves: dict[str, Any], external: set[str]) -> str:
    """Reliability diagrams or FROC curves, of the internal sites together and of each external one."""
    figure, (axis,) = _figure(1, (4.6, 4.2))
    for name in ("overall", *sorted(external)):
        colour, form = EXTERNAL if name in external else INTERNAL
        for kind, curve in curves.get(name, {}).items():
            if kind == "froc":
                x, y = curve["false_positives"], curve["sensitivity"]
                axis.set_xscale("log", base=2)
                axis.set(xlabel="false positives an image", ylabel="sensitivity by lesion", ylim=(0, 1.02))
            else:
                x, y = [point["said"] for point in curve], [point["share"] for point in curve]
                axis.scatter(
                    x, y, [2 + 100 * p["count"] / sum(q["count"] for q in curve) for p in curve], colour
                )
                axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
                axis.set(xlabel="probability said", ylabel="share of positives")
            axis.plot(x, y, form, color=colour, linestyle="-", markersize=4, label=name)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return _inline(figure)


def choose_examples(contract: Contract, body: dict[str, Any]) -> tuple[list[list[int]], str]:
    """A row of examples that went well and one of examples that went wrong, and what they are in words."""
    told = body["predictions"]
    if contract.kind is Kind.SEGMENTATION:
        scores = np.array([np.nan if row["dice"] is None else row["dice"] for row in told])
        order = [int(i) for i in np.argsort(scores, kind="stable") if np.isfinite(scores[i])]
        caption = "Upper row: the best Dice. Lower row: the worst. Truth is drawn solid, the answer dashed."
        return [order[::-1][:COUNT], order[:COUNT]], caption
    truth, score = (np.array([row[name] for row in told]) for name in ("truth", "probability"))
    if contract.kind is Kind.DETECTION:
        faults = np.array([row["lesions"] - row["found"] + row["false_positives"] for row in told])
        right, loss = (faults == 0) & (truth == 1), faults - score
        caption = (
            "Upper row: every lesion found, nothing else. Lower row: the most lesions missed or made up."
        )
        caption += " Lesions are drawn solid; a cross marks each finding."
    else:
        right, loss = (score >= contract.threshold) == truth, np.abs(score - truth)
        caption = "Upper row: right and most certain. Lower row: wrong at the threshold of "
        caption += f"{contract.threshold:.3f}. Red shows where the network looked."
    ranked = np.argsort(loss, kind="stable")
    half = [[int(i) for i in ranked if right[i] and truth[i] == label][: COUNT // 2] for label in (1, 0)]
    wrong = [int(i) for i in ranked[::-1] if not right[i]][:COUNT]
    return [[*half[0], *half[1]], wrong], caption


def plot_examples(contract: Contract, cases: Cases, chosen: list[list[int]]) -> str:
    """Images with what was answered drawn upon them; of a volume its middle slice."""
    figure, axes = _figure(2 * COUNT, (9, 5.4), 2)
    for axis in axes:
        axis.set_axis_off()
    data = cases[0]
    draw: Callable[[Any, Contract, Cases, int], str] = {
        Kind.CLASSIFICATION: _draw_heat, Kind.SEGMENTATION: _draw_masks, Kind.DETECTION: _draw_lesions
    }[contract.kind]  # fmt: skip
    for row, images in enumerate(chosen):
        for axis, i in zip(axes[row * COUNT :], images, strict=False):
            axis.imshow(show_image(data.images[i]), cmap="gray")
            axis.set_title(f"{data.rows['site'].iloc[i]}: {draw(axis, contract, cases, i)}", fontsize=8)
    return _inline(figure)


def _draw_heat(axis: Any, contract: Contract, cases: Cases, i: int) -> str:
    data, answers, heat = cases
    shown = middle(heat[i])
    axis.imshow(shown, cmap="Reds", alpha=0.6 * shown / max(float(shown.max()), 1e-6))
    return f"{contract.classes[int(data.truth[i])]}, said {contract.score(answers[i : i + 1])[0]:.2f}"


def _draw_masks(axis: Any, contract: Contract, cases: Cases, i: int) -> str:
    data, answers, _ = cases
    said = answers[i].argmax(axis=0)
    for label, colour in zip(range(1, len(contract.classes)), COLOURS * len(contract.classes), strict=False):
        for mask, style in ((data.truth[i] == label, "solid"), (said == label, "dashed")):
            if middle(mask).any():
                axis.contour(middle(mask), levels=[0.5], colors=colour, linewidths=0.7, linestyles=style)
    return f"{100 * float((said != data.truth[i]).mean()):.1f} % of pixels wrong"


def _draw_lesions(axis: Any, contract: Contract, cases: Cases, i: int) -> str:
    data, answers, _ = cases
    if data.truth[i].any():
        axis.contour(data.truth[i] > 0, levels=[0.5], colors=COLOURS[0], linewidths=0.8)
    found = [lesion for lesion in find_lesions(answers[i], STRIDE, contract.temperature)
             if lesion.score >= contract.threshold]  # fmt: skip
    axis.plot([lesion.column for lesion in found], [lesion.row for lesion in found], "x", color=COLOURS[1])
    return f"{len(found)} marked"


def _figure(count: int, size: tuple[float, float], rows: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, count // rows)))


def _inline(figure: Any) -> str:
    """A PNG as a data address."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
