"""The evaluation as a page: a forest plot by site, the numbers, and images right and wrong."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from imaging.vocabulary import Kind
from registry.contract import Contract
from training.datasets import Dataset

TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"


def write_report(path: Path, contract: Contract, body: dict[str, Any], cases: tuple[Dataset, Any]) -> None:
    """Write the page; pictures are inside it, and no network is needed to read it.

    Args:
        path: of the page.
        contract: of the package.
        body: of the evaluation statement.
        cases: the images and the engine's probabilities, in the same order.
    """
    from jinja2 import Environment

    rows = {"overall": body["overall"], **body["sites"]}
    names = list(body["overall"])
    worst, best, caption = _choose(contract, *cases)
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text()).render(
        contract=contract, body=body, rows=rows, names=names, forest=_plot_forest(rows, names), caption=caption,
        examples=_plot_examples(contract, cases, [*best, *worst]),
        methods=sorted({told["method"] for scores in rows.values() for told in scores.values()}),
    )  # fmt: skip
    path.write_text(page)


def _choose(contract: Contract, data: Dataset, answers: Any) -> tuple[list[int], list[int], str]:
    """Four images that went best and four that went worst."""
    if contract.kind is Kind.CLASSIFICATION:
        loss = np.abs(answers[:, 1] - data.truth)
        caption = "Upper row: the most certain right answers. Lower row: the most certain wrong ones."
    else:
        loss = (answers.argmax(axis=1) != data.truth).mean(axis=(1, 2))
        caption = (
            "Upper row: the best answers. Lower row: the worst. Outlined: the last class, truth and answer."
        )
    order = np.argsort(loss, kind="stable")
    return [int(i) for i in order[-4:]], [int(i) for i in order[:4]], caption


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


def _plot_examples(contract: Contract, cases: tuple[Dataset, Any], chosen: list[int]) -> str:
    figure, axes = _figure(8, (9, 5.4), rows=2)
    data, answers = cases
    for axis, i in zip(axes, chosen, strict=True):
        axis.imshow(data.images[i, 0], cmap="gray")
        axis.set_axis_off()
        if contract.kind is Kind.SEGMENTATION:
            last = len(contract.classes) - 1
            axis.contour(data.truth[i] == last, levels=[0.5], colors="#e69f00", linewidths=0.7)
            axis.contour(answers[i].argmax(axis=0) == last, levels=[0.5], colors="#56b4e9", linewidths=0.7)
            told = "orange truth, blue answer"
        else:
            told = f"{contract.classes[int(data.truth[i])]}; said {answers[i, 1]:.2f}"
        axis.set_title(f"{data.rows['site'][i]}: {told}", fontsize=8)
    return _inline(figure)


def _figure(count: int, size: tuple[float, float], rows: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, count // rows)))


def _inline(figure: Any) -> str:
    """A PNG as a data address; the same bytes in every run."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
