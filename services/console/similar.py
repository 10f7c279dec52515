"""Cases of the reference that a case resembles most, by its embedding; their pictures where they lie here."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places
from imaging.image import show_image
from imaging.manifest import Pixels
from imaging.preparation import prepare
from registry.package import Contract, shelf
from registry.projection import AXES

MOST = 5
KNOWN = ("sha256", "image", "row", "label", "redistributable")


@dataclass(frozen=True)
class Neighbour:
    """A case of the reference.

    Attributes:
        sha256: of its pixels.
        site: where it comes from.
        distance: in standard deviations of the reference, over all axes of the embedding.
        scores: what the version answered to it.
        truth: its label; empty where the cohort is not here, or has masks instead.
        picture: shard and row of the cohort on this machine, where it may be passed on.
        blank: why there is no picture.
    """

    sha256: str
    site: str
    distance: float
    scores: dict[str, float]
    truth: str = ""
    picture: tuple[str, int] | None = None
    blank: str = "picture not on this machine"


@dataclass(frozen=True)
class Similar:
    """The nearest cases, the nearest first; `told` says of which site they are, or why there are none."""

    told: str
    cases: tuple[Neighbour, ...] = ()


def find_similar(places: Places, row: dict[str, Any], contract: Contract, only: str = "") -> Similar:
    """The reference cases that are nearest to a prediction, at most five.

    Args:
        places: where packages and cohorts lie.
        row: of the journal, `columns` as a dictionary.
        contract: of the version that answered.
        only: the only site that the reader may see; empty for every one.
    """
    seen = {name: row["columns"][name] for name in AXES if name in row["columns"]}
    path = shelf(places.var, row["package"]) / "reference.parquet"
    if not seen or not path.exists():
        return Similar("This answer has no embedding: its version was packaged before they were kept.")
    table = _read(path)
    names = [name for name in seen if name in table]
    here = table["site"] == row["site"]
    if not names or (only and not here.any()):
        return Similar(f"The reference of this version has no cases of {row['site']} to compare with.")
    told = f"What the network sees as most alike among the cases of {row['site']} in the reference."
    if not here.any():
        here[:] = True
        told = f"The reference has no case of {row['site']}; these are most alike among all of its sites."
    apart = np.column_stack([table[name] for name in names]) - [seen[name] for name in names]
    distance = np.where(here, np.linalg.norm(apart, axis=1), np.inf)
    told += f" Half of its {here.sum()} cases are within {np.median(distance[here]):.1f} standard deviations."
    nearest = [number for number in np.argsort(distance, kind="stable")[:MOST] if here[number]]
    known = _find_pictures(places, contract, [str(table["sha256"][number]) for number in nearest])
    return Similar(told, tuple(_name(table, number, float(distance[number]), known) for number in nearest))


def _read(path: Path) -> dict[str, NDArray[Any]]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def _name(table: dict[str, Any], number: int, distance: float, known: dict[str, Any]) -> Neighbour:
    sha256 = str(table["sha256"][number])
    scores = {name: float(table[name][number]) for name in table if name.startswith(("prob", "share_"))}
    return Neighbour(sha256, str(table["site"][number]), distance, scores, *known.get(sha256, ()))


def _find_pictures(places: Places, contract: Contract, wanted: list[str]) -> dict[str, Any]:
    """sha256 -> its label and, where it may be passed on, its place in the cohort on this machine."""
    path = places.stage(contract.task, "cohort") / "manifest.parquet"
    if not path.exists():
        return {}
    import pyarrow.parquet as parquet

    rows = parquet.read_table(path, columns=list(KNOWN), filters=[("sha256", "in", wanted)]).to_pylist()
    return {row["sha256"]: (_tell_truth(row["label"], contract),
                            (row["image"], row["row"]) if row["redistributable"] else None,
                            "picture may not be passed on")
            for row in rows}  # fmt: skip


def _tell_truth(label: float | None, contract: Contract) -> str:
    if label is None or label != label or not 0 <= int(label) < len(contract.classes):
        return ""
    return contract.classes[int(label)]


def draw_picture(places: Places, contract: Contract, picture: tuple[str, int]) -> bytes:
    """A case of the cohort as the network sees it, as a PNG of 8 bit; of a volume its middle slice.

    Raises:
        DataError: the cohort is not there any more.
    """
    from PIL import Image as Pillow

    stored = Pixels(places.stage(contract.task, "cohort")).read(*picture)
    shown = show_image(prepare(stored.astype(np.float32), contract.preparation))
    if shown.ndim == 2:
        low, high = np.percentile(shown, [0.5, 99.5])
        shown = np.clip((shown - low) / max(high - low, 1e-6), 0, 1)
    stream = io.BytesIO()
    Pillow.fromarray(np.rint(255 * shown).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()
