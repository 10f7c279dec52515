"""The model card as one page: its plots as SVG in the page's own ink, and golden images with their heat."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.detection import STRIDE, find_lesions
from imaging.image import middle, show_image
from imaging.vocabulary import Kind, SiteKind, Split
from registry.engines import check_answers, open_engine
from registry.package import Contract, Golden, read_contract, read_golden

TEMPLATE = Path(__file__).parent / "templates" / "card.html"
INK = "#010203"  # becomes the colour of the page's text, light or dark
INTERNAL, EXTERNAL, BOUND = ("#2f7ebc", "o"), ("#d55e00", "s"), "#c2185b"  # told apart also by form
COLOURS = ("#56b4e9", "#e69f00", "#cc79a7")
UNPLOTTED = ("brier", "calibration", "surface", "hausdorff")  # in the tables alone: on other scales
COUNT = 4  # plots in a row


def render_card(card: dict[str, Any], folder: Path) -> str:
    """The card as one HTML page that needs no network.

    Args:
        card: as `build_card` returns it.
        folder: of the package, for its golden images.

    Raises:
        TrustError: the golden images or the engine do not hold to the contract.
    """
    from jinja2 import Environment

    contract = read_contract(folder)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(words=split_words, figure=tell_figure)
    figures = card["Figures"]
    plots = {
        "forest": draw_forest(figures),
        "curves": draw_curves(figures),
        "robustness": draw_robustness(figures),
        "examples": draw_examples(contract, folder, explained=_is_explained(figures)),
    }
    return environment.from_string(TEMPLATE.read_text()).render(card=card, plots=plots, contract=contract)


def split_words(name: str) -> str:
    """`KnownRisksAndLimitations` as words."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return words[:1] + re.sub(r"\b[A-Z](?=[a-z])", lambda found: found.group().lower(), words[1:])


def tell_figure(value: Any) -> str:
    """A fact's value as text: four places, digests short, times to the minute, nothing as `none`."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        told = [tell_figure(item) for item in value]
        return "; ".join(one.rstrip(".") for one in told) if max(map(len, told)) > 30 else ", ".join(told)
    if isinstance(value, float):
        return f"{value:.4g}"
    text = re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*$", r"\1 \2 UTC", str(value))
    return f"{text[:19]}…" if text.startswith("sha256:") else text


def _is_explained(figures: dict[str, Any]) -> bool:
    return "Explanation" in figures and figures["Explanation"]["passed"]["value"] is True


def is_external(figures: dict[str, Any], site: str) -> bool:
    """Whether a site of the card is external; what was scored says so."""
    return bool(figures["Kinds"].get(site, {}).get("value") == Split.EXTERNAL)


def draw_forest(figures: dict[str, Any]) -> str:
    """Estimates and intervals by site, a plot a metric, and the policy's bound on each row.

    Args:
        figures: trees of the card.

    Returns:
        SVG; empty where nothing was scored.
    """
    rows = {"all internal": figures.get("Overall", {}), **figures.get("Sites", {})}
    names = [
        name for name in rows["all internal"] if not name.startswith(UNPLOTTED) or name in _bounded(figures)
    ]
    if not names:
        return ""
    wide, lines = min(COUNT, len(names)), -(-len(names) // COUNT)
    figure, axes = _figure((2.6 * wide + 0.8, lines * (0.3 * len(rows) + 0.8)), (lines, wide))
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for number, (axis, name) in enumerate(zip(axes, names, strict=False)):
        for place, (row, told) in enumerate(reversed(rows.items())):
            _draw_row(axis, place, told.get(name), is_external(figures, row))
            for bound in _find_bounds(figures, row, name):
                axis.plot([bound, bound], [place - 0.36, place + 0.36], color=BOUND, linewidth=2)
        axis.set(title=name.replace("_", " "), ylim=(-0.6, len(rows) - 0.4))
        axis.set_yticks(range(len(rows)), list(reversed(rows)) if number % wide == 0 else [""] * len(rows))
        axis.grid(axis="x", alpha=0.25)
    return _draw(figure, "Estimates with intervals by site, and the bounds of the policy")


def _draw_row(axis: Any, place: int, told: dict[str, Any] | None, external: bool) -> None:
    if told:
        colour, form = EXTERNAL if external else INTERNAL
        axis.plot([told["low"], told["high"]], [place, place], color=colour)
        axis.plot(told["value"], place, form, color=colour, markersize=5)


def _bounded(figures: dict[str, Any]) -> set[str]:
    return {
        name
        for bounds in figures["Bounds"].values()
        for side in ("low", "high")
        for name in bounds.get(side, {})
    }


def _find_bounds(figures: dict[str, Any], row: str, metric: str) -> list[float]:
    """The policy's bounds on a metric, of the network, or of a site by its kind."""
    kind = (
        "network"
        if row == "all internal"
        else SiteKind.EXTERNAL
        if is_external(figures, row)
        else SiteKind.INTERNAL
    )
    bounds = figures["Bounds"][str(kind)]
    return [bounds[side][metric]["value"] for side in ("low", "high") if metric in bounds.get(side, {})]


def draw_curves(figures: dict[str, Any]) -> str:
    """Reliability diagrams, or FROC curves of a detection: internal sites together, and each external one."""
    curves = figures.get("Curves", {})
    shown = [name for name in curves if curves[name] and (name == "overall" or is_external(figures, name))]
    if not shown:
        return ""
    figure, (axis,) = _figure((4.6, 4.0), (1, 1))
    for name in shown:
        colour, form = EXTERNAL if name != "overall" else INTERNAL
        for kind, curve in curves[name].items():
            x, y = _trace(axis, kind, curve, colour)
            label = "all internal" if name == "overall" else f"{name} (external)"
            axis.plot(x, y, form, color=colour, linestyle="-", markersize=4, label=label)
    axis.legend(frameon=False, labelcolor=INK)
    axis.grid(alpha=0.25)
    return _draw(figure, "Reliability, or FROC, of the internal sites together and of each external site")


def _trace(axis: Any, kind: str, curve: Any, colour: str) -> tuple[list[float], list[float]]:
    if kind == "froc":
        axis.set_xscale("log", base=2)
        axis.set(xlabel="false positives an image", ylabel="sensitivity by lesion", ylim=(0, 1.02))
        return curve["false_positives"]["value"], curve["sensitivity"]["value"]
    x, y, count = ([point[name]["value"] for point in curve] for name in ("said", "share", "count"))
    axis.scatter(x, y, [2 + 120 * n / sum(count) for n in count], colour)
    axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.5)
    axis.set(xlabel="probability said", ylabel="share of positives", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return x, y


def draw_robustness(figures: dict[str, Any]) -> str:
    """The score by severity of each family of corruption, with intervals; dashed: clean images."""
    if "Robustness" not in figures:
        return ""
    told = figures["Robustness"]
    families: dict[str, list[dict[str, Any]]] = {}
    for cell in told["cells"]:
        families.setdefault(cell["family"]["value"], []).append(cell)
    lines = -(-len(families) // COUNT)
    figure, axes = _figure((2.6 * COUNT, 1.9 * lines), (lines, COUNT), share=True)
    for axis in axes[len(families) :]:
        axis.set_axis_off()
    for axis, (family, cells) in zip(axes, families.items(), strict=False):
        seen = cells[0]["group"]["value"] == "seen"
        colour, form = INTERNAL if seen else EXTERNAL
        steps = [cell["severity"]["value"] for cell in cells]
        score, low, high = ([cell["value"][end] for cell in cells] for end in ("value", "low", "high"))
        axis.fill_between(
            steps, *(np.array(end, dtype=float) for end in (low, high)), color=colour, alpha=0.25, lw=0
        )
        axis.plot(steps, np.array(score, dtype=float), form, color=colour, linestyle="-", markersize=4)
        axis.axhline(told["clean"]["value"]["value"], color=INK, linestyle="--", linewidth=0.8, alpha=0.6)
        axis.set(title=f"{family} ({'seen' if seen else 'held out'})", xticks=steps)
        axis.grid(alpha=0.25)
    return _draw(figure, "Score by severity of each family of corruption, with intervals")


def draw_examples(contract: Contract, folder: Path, explained: bool) -> str:
    """Golden images, what was answered, and where the network looked if the audit of its maps passed.

    Args:
        contract: of the package.
        folder: of the package.
        explained: whether heat may be shown.

    Raises:
        TrustError: the engine's answers are not what the contract promises.
    """
    golden = read_golden(folder)
    chosen = _choose(contract, golden)
    heat = None
    if explained:
        answers = open_engine(folder, "onnxruntime", "f32").run(golden.images[chosen])
        check_answers(answers, contract, len(chosen))
        heat = answers.heat
    figure, axes = _figure((2.3 * len(chosen), 2.6), (1, len(chosen)))
    for number, (axis, i) in enumerate(zip(axes, chosen, strict=True)):
        axis.set_axis_off()
        axis.imshow(show_image(golden.images[i]), cmap="gray")
        axis.set_title(_draw_answer(axis, contract, golden.logits[i : i + 1]))
        if heat is not None:
            shown = np.clip(middle(heat[number]), 0, None)
            axis.imshow(shown, cmap="Reds", alpha=0.6 * shown / max(float(shown.max()), 1e-6))
    return _draw(figure, "Golden images of the package and what the model answers")


def _choose(contract: Contract, golden: Golden) -> list[int]:
    """The images that it is surest of, half of them positive; of a segmentation the first."""
    if contract.kind is Kind.SEGMENTATION:
        return list(range(min(COUNT, len(golden.images))))
    order = [int(i) for i in np.argsort(contract.score(contract.probabilities(golden.logits)), kind="stable")]
    half = min(COUNT, len(order)) // 2
    return [*order[::-1][:half], *order[:half]] if half else order


def _draw_answer(axis: Any, contract: Contract, logits: NDArray[np.float32]) -> str:
    """Draw what was answered of an image, and say it."""
    if contract.kind is Kind.SEGMENTATION:
        said = middle(logits[0].argmax(axis=0))
        for label, colour in zip(
            range(1, len(contract.classes)), COLOURS * len(contract.classes), strict=False
        ):
            if (said == label).any():
                axis.contour(said == label, levels=[0.5], colors=colour, linewidths=0.8)
        return "outlined"
    if contract.kind is Kind.DETECTION:
        found = [
            one
            for one in find_lesions(logits[0], STRIDE, contract.temperature)
            if one.score >= contract.threshold
        ]
        axis.plot([one.column for one in found], [one.row for one in found], "x", color=COLOURS[1])
    positive = contract.score(contract.probabilities(logits))[0] >= contract.threshold
    return "called positive" if positive else "called negative"


def _figure(size: tuple[float, float], shape: tuple[int, int], share: bool = False) -> tuple[Any, list[Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color",
                           "grid.color"), INK)  # fmt: skip
    with rc_context(
        {**inked, "axes.titlesize": 10, "font.size": 9, "axes.facecolor": "none", "text.parse_math": False}
    ):
        figure = Figure(figsize=size, layout="constrained")
        return figure, list(np.ravel(figure.subplots(*shape, sharey=share)))


def _draw(figure: Any, title: str) -> str:
    """SVG that is the same in every run, its text as text, to stand inside a page."""
    from markupsafe import Markup, escape
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))
