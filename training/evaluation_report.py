"""The evaluation as a page: a forest plot by site, the numbers, and images right and wrong."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.vocabulary import Kind
from registry.contract import Contract
from training.datasets import Dataset

TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"
Cases = tuple[Dataset, NDArray[np.float32], NDArray[np.float32]]
COUNT = 4  # examples in a row
COLOURS = ("#56b4e9", "#e69f00", "#cc79a7")  # told apart by colour-blind eyes too


def write_report(path: Path, contract: Contract, body: dict[str, Any], cases: Cases) -> None:
    """Write the page; pictures are inside it, and no network is needed to read it.

    Args:
        path: of the page.
        contract: of the package.
        body: of the evaluation statement.
        cases: the images, and the engine's probabilities and heat, in the same order.
    """
    from jinja2 import Environment

    rows = {"overall": body["overall"], **body["sites"]}
    names = list(body["overall"])
    chosen, caption = _choose(contract, body, cases[0].truth)
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text()).render(
        contract=contract, body=body, rows=rows, names=names, caption=caption,
        forest=_plot_forest(rows, names), examples=_plot_examples(contract, cases, chosen),
        methods=sorted({told["method"] for scores in rows.values() for told in scores.values()}),
    )  # fmt: skip
    path.write_text(page)


def _choose(contract: Contract, body: dict[str, Any], truth: Any) -> tuple[list[list[int]], str]:
    """A row of examples that went well and one of examples that went wrong, and what they are in words."""
    told = body["predictions"]
    if contract.kind is Kind.SEGMENTATION:
        scores = np.array([np.nan if row["dice"] is None else row["dice"] for row in told])
        order = [int(i) for i in np.argsort(scores, kind="stable") if np.isfinite(scores[i])]
        caption = "Upper row: the best Dice. Lower row: the worst. Truth is drawn solid, the answer dashed."
        return [order[::-1][:COUNT], order[:COUNT]], caption
    score = np.array([row["probability"] for row in told])
    right, loss = (score >= contract.threshold) == truth, np.abs(score - truth)
    ranked = np.argsort(loss, kind="stable")
    half = [[int(i) for i in ranked if right[i] and truth[i] == label][: COUNT // 2] for label in (1, 0)]
    wrong = [int(i) for i in ranked[::-1] if not right[i]][:COUNT]
    return [[*half[0], *half[1]], wrong], (
        f"Upper row: right and most certain. Lower row: wrong at the threshold of {contract.threshold:.3f}. "
        "Red shows where the network looked."
    )


def _plot_forest(rows: dict[str, Any], names: list[str]) -> str:
    figure, axes = _figure(len(names), (3.2 * len(names), 0.4 * len(rows) + 1.1))
    for axis, name in zip(axes, names, strict=True):
        for place, told in enumerate(reversed(list(rows.values()))):
            score = told[name]
            axis.plot([score["low"], score["high"]], [place, place], color="#2a5d84")
            axis.plot(score["estimate"], place, "o", color="#2a5d84")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_yticks(range(len(rows)), list(reversed(rows)) if axis is axes[0] else [""] * len(rows))
        axis.grid(axis="x", alpha=0.3)
    return _inline(figure)


def _plot_examples(contract: Contract, cases: Cases, chosen: list[list[int]]) -> str:
    figure, axes = _figure(2 * COUNT, (9, 5.4), rows=2)
    for axis in axes:
        axis.set_axis_off()
    data = cases[0]
    for row, images in enumerate(chosen):
        for axis, i in zip(axes[row * COUNT :], images, strict=False):
            axis.imshow(data.images[i, 0], cmap="gray")
            told = _overlay(axis, contract, cases, i)
            axis.set_title(f"{data.rows['site'][i]}: {told}", fontsize=8)
    return _inline(figure)


def _overlay(axis: Any, contract: Contract, cases: Cases, i: int) -> str:
    """Draw what was answered upon an image.

    Returns:
        The answer in words.
    """
    data, answers, heat = cases
    if contract.kind is Kind.CLASSIFICATION:
        axis.imshow(heat[i], cmap="Reds", alpha=0.6 * heat[i] / max(float(heat[i].max()), 1e-6))
        return f"{contract.classes[int(data.truth[i])]}, said {answers[i, 1]:.2f}"
    said = answers[i].argmax(axis=0)
    for label, colour in zip(range(1, len(contract.classes)), COLOURS * len(contract.classes), strict=False):
        for mask, style in ((data.truth[i] == label, "solid"), (said == label, "dashed")):
            if mask.any():
                axis.contour(mask, levels=[0.5], colors=colour, linewidths=0.7, linestyles=style)
    wrong = float((said != data.truth[i]).mean())
    return f"{100 * wrong:.1f} % of pixels wrong"


def _figure(count: int, size: tuple[float, float], rows: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, count // rows)))


def _inline(figure: Any) -> str:
    """A PNG as a data address; the same bytes in every run."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
