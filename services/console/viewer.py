"""The image of a case: what was sent, where its site keeps pixels; heat map and mask are made again of it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.routing import Route

from imaging.config import Places, read_sites
from imaging.errors import FormularyError, NotApproved, Overloaded, TooLarge, UnknownPrediction
from imaging.image import Pixels
from imaging.reading import decode
from imaging.vocabulary import Kind, Modality
from monitoring.journal import Journal
from registry.package import Contract, read_contract, shelf
from services.console.doors import Page, Visit, status_of
from services.console.similar import draw_picture, find_similar
from services.findings import Found, Taken, find, take
from services.runner import Ran
from services.served import Served
from services.slots import Slots
from services.vault import Held, find_file, find_pixels

MOST_BYTES = 64 * 2**20
AT_ONCE = 2  # images that are decoded, or answered again, at the same time
TURN_S, ENGINE_S = 2.0, 10.0  # whoever waits for them holds a thread that other pages need
NO_OUTLINE = "Answers of this kind have no outline."
TYPES = (np.uint8, np.int16, np.uint16)
Show = Callable[[Visit, dict[str, Any]], Response]
Hold = Callable[[Visit, str], None]


class Viewer:
    """What the page of a case fetches: pixels, heat map, mask, and pictures of similar cases.

    Args:
        places: where keys, pixels, packages and cohorts lie.
        journal: predictions.
        slots: what serves: it draws a heat map or a mask again.
    """

    def __init__(self, places: Places, journal: Journal, slots: Slots) -> None:
        self._places, self._journal, self._slots = places, journal, slots
        self._turns = threading.BoundedSemaphore(AT_ONCE)

    def routes(self, home: str, page: Callable[[Page], Any], hold: Hold) -> list[Route]:
        """The paths behind a case's page.

        Args:
            home: path of all cases.
            page: makes an endpoint that asks for a session.
            hold: refuses a visit of somebody who may not see a site.
        """
        made = {
            "pixels": self._show_pixels, "heat": self._show_heat, "mask": self._show_mask,
            "similar/{sha256}.png": self._show_picture,
        }  # fmt: skip
        return [
            Route(f"{home}/{{number}}/{name}", page(self._wrap(show, hold)), methods=["GET"])
            for name, show in made.items()
        ]

    def describe(self, row: dict[str, Any], contract: Contract, only: str = "") -> dict[str, Any]:
        """What the page of a case has to know.

        Args:
            row: of the journal, `columns` as a dictionary.
            contract: of the version that answered.
            only: the only site that the reader may see; empty for every one.
        """
        served = self._find_served(row["package"])
        away = (
            "" if served else f"{row['task']} v{row['version']} is not open here, so nothing is drawn again."
        )
        withheld = served.heat_withheld if served else ""
        window = contract.preparation if contract.preparation.kind == "window" else None
        return {
            "missing": self._tell_missing(row["site"], row["id"]),
            "heat": withheld and f"Heat maps of this version are withheld: {withheld}." if served else away,
            "mask": NO_OUTLINE if contract.kind is Kind.CLASSIFICATION else away,
            "outlined": contract.kind is not Kind.CLASSIFICATION,
            "labels": json.dumps(_name_labels(contract)),
            "window": f"{window.low_hu},{window.high_hu}" if window else "",
            "axial": contract.modality in (Modality.CT, Modality.MR),
            "similar": find_similar(self._places, row, contract, only),
        }  # fmt: skip

    def _tell_missing(self, site: str, number: str) -> str:
        """Why there is nothing to show; empty where there is."""
        if find_file(self._places.var, site, number):
            return ""
        sites = read_sites(self._places).sites
        days = sites[site].keep_days if site in sites else 0
        if not days:
            return f"No pixels of this case are kept: sites.yaml keeps none at {site}."
        return (f"No pixels of this case are kept. {site} keeps those of images, not of jobs, for {days} "
                f"day{'s' * (days > 1)}; what comes faster than it can be written is left out.")  # fmt: skip

    def _wrap(self, show: Show, hold: Hold) -> Page:
        """A page for a script: an error is a sentence, and nobody else's page may embed what is shown."""

        def answer(visit: Visit) -> Response:
            try:
                row = self._journal.find(visit.given("number"))
                if row is None:
                    raise UnknownPrediction("There is no such prediction.", "Open one from its site's page.")
                hold(visit, row["site"])
                shown = self._take_turn(show, visit, row)
            except FormularyError as error:
                shown = Response(str(error), status_of(error, visit.request), media_type="text/plain")
            shown.headers["Cross-Origin-Resource-Policy"] = "same-origin"
            return shown

        return answer

    def _take_turn(self, show: Show, visit: Visit, row: dict[str, Any]) -> Response:
        if not self._turns.acquire(timeout=TURN_S):
            raise Overloaded("Other images are being drawn.", "Ask again in a second.")
        try:
            return show(visit, row)
        finally:
            self._turns.release()

    def _show_pixels(self, _: Visit, row: dict[str, Any]) -> Response:
        held, contract = self._open(row), read_contract(shelf(self._places.var, row["package"]))
        image = decode(held.body, held.kind, contract.png_offset)
        axes = "rows,columns,colours" if contract.channels == 3 else "rows,columns"
        if contract.depth:
            axes = "depth,rows,columns"
        spacing = image.spacing_mm and ",".join(f"{side:g}" for side in image.spacing_mm)
        return send_plane(shrink(image.pixels), axes, spacing or "")

    def _show_heat(self, _: Visit, row: dict[str, Any]) -> Response:
        served = self._need_served(row)
        if served.heat_withheld:
            raise NotApproved("Heat maps of this version are withheld.", served.heat_withheld)
        ran = self._run(row, served)[1]
        heat = np.maximum(ran.answers.heat[0], 0)
        return send_plane(np.rint(255 * heat / max(float(heat.max()), 1e-12)).astype(np.uint8), "heat")

    def _show_mask(self, _: Visit, row: dict[str, Any]) -> Response:
        served = self._need_served(row)
        taken, ran = self._run(row, served)
        found = find(taken, ran.answers, served.contract, None, served.profile)
        labels = draw_boxes(found, served.contract) if found.labels is None else found.labels
        return send_plane(labels, "labels")

    def _show_picture(self, visit: Visit, row: dict[str, Any]) -> Response:
        contract = read_contract(shelf(self._places.var, row["package"]))
        told = {**row, "columns": json.loads(row["columns"])}
        for case in find_similar(self._places, told, contract, visit.site).cases:
            if case.sha256 == visit.given("sha256") and case.picture:
                return Response(draw_picture(self._places, contract, case.picture), media_type="image/png")
        raise UnknownPrediction("There is no such picture of a similar case.", "Open the case again.")

    def _open(self, row: dict[str, Any]) -> Held:
        held = find_pixels(self._places, row["site"], row["id"])
        if held is None:
            raise UnknownPrediction(self._tell_missing(row["site"], row["id"]), "See sites.yaml.")
        return held

    def _run(self, row: dict[str, Any], served: Served) -> tuple[Taken, Ran]:
        """Ask the version again, among everybody's requests."""
        held = self._open(row)
        taken = take(held.body, held.kind, served.contract)
        try:
            return taken, served.runner.submit(taken.prepared).result(ENGINE_S)
        except TimeoutError as error:
            raise Overloaded("The engine has no time for it.", "Ask again in a minute.") from error

    def _need_served(self, row: dict[str, Any]) -> Served:
        served = self._find_served(row["package"], row["site"])
        if served is None:
            fact = f"{row['task']} v{row['version']} is not open here, so nothing is drawn again."
            raise NotApproved(fact, f"formulary services replay {row['id']} FILE answers it again.")
        return served

    def _find_served(self, digest: str, site: str = "") -> Served | None:
        """A package that is open, with the profile of a site where it serves there."""
        tables = self._slots.tables
        open_now = {place: served for place, (served, _) in tables.canaries.items()} | tables.champions
        found = [(place[1] != site, served) for place, served in open_now.items() if served.digest == digest]
        return min(found, key=lambda one: one[0])[1] if found else None


def shrink(pixels: Pixels) -> NDArray[Any]:
    """The pixels unchanged, in the smallest of uint8, int16 and uint16 that holds them, else float32.

    Args:
        pixels: float32, finite.
    """
    low, high = float(pixels.min()), float(pixels.max())
    for kind in TYPES:
        limits = np.iinfo(kind)
        if limits.min <= low and high <= limits.max:
            stored = pixels.astype(kind)
            return stored if bool((stored == pixels).all()) else pixels
    return pixels


def draw_boxes(found: Found, contract: Contract) -> NDArray[np.uint8]:
    """Outlines of lesions as labels: 1 on the edge of each box, (rows, columns)."""
    labels = np.zeros(contract.spatial, np.uint8)
    for one in found.answer.get("lesions", ()):
        low = [
            max(0, round(one[at] - one[size] / 2)) for at, size in (("row", "height"), ("column", "width"))
        ]
        high = [round(one[at] + one[size] / 2) for at, size in (("row", "height"), ("column", "width"))]
        rows, columns = (slice(start, end + 1) for start, end in zip(low, high, strict=True))
        for edge in (low[0], min(high[0], contract.rows - 1)):
            labels[edge, columns] = 1
        for edge in (low[1], min(high[1], contract.columns - 1)):
            labels[rows, edge] = 1
    return labels


def send_plane(values: NDArray[Any], axes: str, spacing_mm: str = "") -> Response:
    """Raw numbers, little-endian and row-major, with what they are in headers.

    Raises:
        TooLarge: over 64 MiB.
    """
    if values.nbytes > MOST_BYTES:
        fact = f"The image has {math.prod(values.shape)} values, over {MOST_BYTES // 2**20} MiB."
        raise TooLarge(fact, "It can be kept, and not be shown.")
    body = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    headers = {"X-Shape": ",".join(map(str, values.shape)), "X-Axes": axes, "X-Type": values.dtype.name,
               "X-Spacing-Mm": spacing_mm}  # fmt: skip
    return Response(body, headers=headers, media_type="application/octet-stream")


def _name_labels(contract: Contract) -> list[str]:
    return ["", "lesion"] if contract.kind is Kind.DETECTION else ["", *contract.classes[1:]]
