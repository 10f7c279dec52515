"""Tables, and the formats of pictures and slides: an opener hands a source over entry by entry."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from imaging.vocabulary import AgeBand, Kind, Modality, Sex, Split
from training.items import Entry, Item, Opened, Plane, Wish, inside, insist, refuse

TOLD = ("sex", "age", "acquired", "scanner")
UNTOLD = ("", "n/a", "unknown")
UNDATED = date(1900, 1, 1)
SEXES = {"f": Sex.FEMALE, "female": Sex.FEMALE, "m": Sex.MALE, "male": Sex.MALE}
SEXES |= dict.fromkeys((*UNTOLD, "o", "other"), Sex.UNKNOWN)
YEARS = {"M": 12, "W": 52.2, "D": 365.25}
BANDS = ((18, AgeBand.UNDER_18), (40, AgeBand.UNDER_40), (60, AgeBand.UNDER_60), (75, AgeBand.UNDER_75))
SPLITS = {"val": Split.VALIDATION} | {split.value: split for split in Split}
TILE, TISSUE = 256, 20  # pixels; saturation, of 255, from which glass is covered
PARTS = ("train", "val", "test")
NO_SUBJECTS = "Subject split not possible: MedMNIST has no subject ids, so images of one person may stand in several splits."  # noqa: E501


def read_table(path: Path, needed: tuple[str, ...], allowed: tuple[str, ...] | None) -> list[tuple[str, Any]]:
    """Rows of a CSV or TSV file, each with its name: file and row, the header being row 1."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, restval="", delimiter="\t" if path.suffix == ".tsv" else ",")
        columns = list(table.fieldnames or ())
        missing = [name for name in needed if name not in columns]
        strange = [name for name in columns if allowed is not None and name not in (*needed, *allowed)]
        strange += [name for name in set(columns) if columns.count(name) > 1]
        told = f"{path.name} lacks the columns {missing}, or has {strange} unasked or twice."
        insist(not missing and not strange, told, f"Columns: {', '.join((*needed, *(allowed or ())))}.")
        return [
            (f"{path.name} row {table.line_num}",
             {name: text.strip() if isinstance(text, str) else text for name, text in row.items()})
            for row in table
        ]  # fmt: skip


def read_people(rows: list[tuple[str, Any]], column: str) -> tuple[dict[str, Any], list[Entry]]:
    """A table's rows by subject, with their `key`; and those that repeat another, refused."""
    people: dict[str, Any] = {}
    for key, row in rows:
        people.setdefault(row[column], row | {"subject": row[column], "key": key})
    firsts = ((key, people[row[column]]["key"]) for key, row in rows)
    return people, [refuse(key, f"It repeats {first}.") for key, first in firsts if key != first]


def refuse_unseen(people: dict[str, Any], seen: set[str]) -> list[Entry]:
    """Rows that nothing in the source belongs to."""
    return [refuse(row["key"], "Nothing is of this subject.")
            for name, row in people.items() if name not in seen]  # fmt: skip


def read_labels(wish: Wish) -> tuple[dict[str, Any], list[Entry]]:
    """The table --labels by subject, as `read_people` returns it."""
    rows = read_table(wish.labels, ("subject",), ("label", "site", *TOLD)) if wish.labels else []
    return read_people(rows, "subject")


def tell(row: Any, wish: Wish, load: Callable[[], Iterable[Plane]], pieces: bool = True) -> Item:
    """An item with what a row of a table says of it."""
    insist(None not in row, "The row has more fields than columns.", "Quote fields with commas.")
    split = row.get("split") or ""
    insist(not split or split in SPLITS, f"The split is {split[:20]!r}.", f"Splits: {', '.join(SPLITS)}.")
    label = read_label(row.get(wish.label_column or "label") or "", wish.classes)
    site = row.get("site") or wish.site
    return Item(row["subject"], site, load, label, SPLITS.get(split), describe_person(row), pieces)


def read_label(text: str, classes: tuple[str, ...]) -> int | None:
    """The number of a class from its name or number; None for an empty field."""
    if text.lower() in ("", "n/a"):
        return None
    number = classes.index(text) if text in classes else int(text) if text.isdecimal() else len(classes)
    insist(number < len(classes), f"The label {text[:40]!r} is no class.", f"Classes: {', '.join(classes)}.")
    return number


def describe_person(row: Mapping[str, str]) -> dict[str, str]:
    """Sex, age band, day and scanner in the house's words, from a table's or DICOM's."""
    sex, age, day, scanner = (row.get(name) or "" for name in TOLD)
    insist(sex.lower() in SEXES, f"The sex {sex[:20]!r} is not F, M or unknown.", "Leave it empty.")
    try:
        acquired = UNDATED if day.lower() in UNTOLD else date.fromisoformat(day[:10])
    except ValueError:
        acquired = date.max
    told = f"The day {day[:20]!r} is to come, or not YYYY-MM-DD."
    insist(acquired <= date.today(), told, "Mend it, or leave it empty.")
    return {"sex": SEXES[sex.lower()].value, "age_band": _age_band(age).value,
            "acquired": acquired.isoformat(), "scanner": scanner.strip() or "unknown"}  # fmt: skip


def _age_band(age: str) -> AgeBand:
    """From years (45, 45.5, 89+), DICOM's 045Y or 018M, or a band."""
    if age in list(AgeBand) or age.lower() in UNTOLD:
        return AgeBand(age or "unknown") if age in ("", *AgeBand) else AgeBand.UNKNOWN
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)([YMWD]?)\+?", age)
    years = float(match[1]) / YEARS.get(match[2], 1) if match else -1
    insist(0 <= years <= 130, f"The age {age[:20]!r} is not in years.", "Mend it, or leave it empty.")
    return next((band for limit, band in BANDS if years < limit), AgeBand.OVER_75)


def store(pixels: NDArray[Any], wanted: str, exact: bool = False) -> NDArray[Any]:
    """The same finite numbers in a stored type; fractions are rounded for integers, or refused (exact)."""
    insist(pixels.dtype.kind in "iuf", f"It holds {pixels.dtype}.", "Write integers or floats.")
    insist(np.isfinite(pixels).all(), "Some pixels are NaN or infinite.", "Write finite numbers.")
    info, low, high = np.finfo if wanted == "float32" else np.iinfo, pixels.min(), pixels.max()
    fits = info(wanted).min <= low and high <= info(wanted).max
    insist(fits, f"Its pixels, {low:g} to {high:g}, do not fit {wanted}.", "Choose another --store.")
    if pixels.dtype.kind == "f" and wanted != "float32":
        whole = np.rint(pixels)
        insist(
            not exact or np.abs(whole - pixels).max() < 1e-3, "It holds fractions.", "Write whole numbers."
        )
        pixels = whole
    return pixels.astype(wanted)


def centre(pixels: NDArray[Any], size: tuple[int | None, ...], fill: Any) -> NDArray[Any]:
    """The centre of an array, cropped or padded with `fill` to `size`; None keeps an axis."""
    for axis, wanted in enumerate(size):
        if wanted:
            pad = np.zeros((pixels.ndim, 2), int)
            short = max(0, wanted - pixels.shape[axis])
            pad[axis] = short // 2, short - short // 2
            pixels = np.pad(pixels, pad, constant_values=fill)
            start = (pixels.shape[axis] - wanted) // 2
            pixels = pixels.take(range(start, start + wanted), axis)
    return pixels


def open_medmnist(source: Path, wish: Wish) -> Opened:
    """MedMNIST and MedMNIST+ .npz: planes, colour or volumes, with their own splits and no subjects."""
    archive, told = ZipFile(source), describe_person({})
    shapes = {part: _open_array(archive, f"{part}_images.npy")[0] for part in PARTS}
    truths = {part: _read_labels(archive, f"{part}_labels.npy", wish) for part in PARTS}
    whole = {part: shape[0] == len(truths[part]) for part, shape in shapes.items()}
    insist(all(whole.values()), f"Has each image a label? {whole}.", "Mend the labels.")
    wish = wish.model_copy(
        update={"volumes": len(shapes["train"]) == 4 and shapes["train"][-1] not in (1, 3)}
    )

    def make(part: str, number: int, pixels: NDArray[Any]) -> Item:
        label, subject = truths[part][number], f"{part}-{number:06d}"
        known = label in range(len(wish.classes))
        insist(known, f"The label {label} is no class.", f"Classes: {', '.join(wish.classes)}.")
        return Item(subject, wish.site, lambda: [_plane(pixels, None, wish)], int(label), SPLITS[part], told)

    entries = ((f"{source.name} {part}_images row {number}", partial(make, part, number, pixels))
               for part in PARTS
               for number, pixels in enumerate(_open_array(archive, f"{part}_images.npy")[1]))  # fmt: skip
    total, modality = sum(map(len, truths.values())), wish.modality or Modality.OTHER
    return Opened(total, entries, Kind.CLASSIFICATION, modality, wish.classes, (NO_SUBJECTS,), {}, False)


def _read_labels(archive: ZipFile, name: str, wish: Wish) -> NDArray[Any]:
    """Labels (n,) out of (n,), (n, 1) or, where a column is chosen, (n, several)."""
    with archive.open(name) as stream:
        labels = np.lib.format.read_array(stream, allow_pickle=False)
    table = labels.reshape(len(labels), -1)
    column = wish.label_column or ("0" if table.shape[1] == 1 else "")
    known = column.isdecimal() and int(column) < table.shape[1]
    insist(known, f"{name} has {table.shape[1]} labels an image.", "Choose with --label-column 0, 1, ...")
    return np.asarray(table[:, int(column)])


def _open_array(archive: ZipFile, name: str) -> tuple[tuple[int, ...], Iterator[NDArray[Any]]]:
    """The shape of an array, and its rows, which are read one after the other."""
    insist(name in archive.namelist(), f"The file lacks {name}.", "Send a MedMNIST file.")
    stream = archive.open(name)
    version = np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    plain = version == (1, 0) and not fortran and not dtype.hasobject and len(shape) in (3, 4)
    insist(plain, f"{name} is no C array (n[, depth], rows, columns[, 3]).", "Save it as one.")
    size = dtype.itemsize * int(np.prod(shape[1:]))
    bodies = (stream.read(size) for _ in range(shape[0]))
    return shape, (np.frombuffer(body, dtype).reshape(shape[1:]) for body in bodies)


def _plane(pixels: NDArray[Any], mask: Path | None, wish: Wish) -> Plane:
    """A picture as it will be stored, with its mask."""
    size = (wish.depth, wish.rows, wish.columns) if wish.volumes else (wish.rows, wish.columns)
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3 and not wish.volumes
    fits = pixels.ndim == len(size) + colour
    insist(fits, f"It has shape {pixels.shape}.", "Send (rows, columns[, 3]), or use --volumes.")
    wanted = "uint8" if colour else wish.type_of(pixels.dtype)
    pixels, truth = store(pixels, wanted, exact=wanted == "uint8"), None  # 0 to 1 would round to black
    if mask:
        truth = _read_mask(mask, wish)
        fits = truth.shape == pixels.shape[: len(size)]
        insist(fits, f"Its mask has shape {truth.shape}, it {pixels.shape}.", "Mend the mask.")
        truth = centre(truth, size, 0)
    return Plane(centre(pixels, size, pixels.min()), truth, wish.spacing_mm or 0.0)


def _read_mask(path: Path, wish: Wish) -> NDArray[np.uint8]:
    """Classes (rows, columns); where there are two, 255 may stand for 1."""
    mask = store(read_picture(path), "uint8", exact=True)
    two = len(wish.classes) == 2 and set(np.unique(mask)) <= {0, 255}
    return np.asarray(mask // 255 if two else mask, np.uint8)


def read_picture(path: Path) -> NDArray[Any]:
    """PNG, JPEG, TIFF (one page, grey or RGB without alpha) or .npy."""
    from PIL import Image as Pillow

    if path.suffix == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    with Pillow.open(path, formats=("PNG", "JPEG", "TIFF")) as picture:
        deep = picture.mode == "RGB" and any(";16" in str(part) for part in picture.tile)
        plain = picture.mode in ("L", "I", "F", "RGB", "I;16", "I;16B") and not deep
        single = getattr(picture, "n_frames", 1) == 1
        told = f"It has mode {picture.mode}, pages or deep colour."
        insist(plain and single, told, "Send grey or 8 bit RGB.")
        return np.asarray(picture)


def open_csv(source: Path, wish: Wish) -> Opened:
    """An image folder with a table: path, subject, and what else is known."""
    return _open_table(source, wish, "path", lambda path, mask: [_plane(read_picture(path), mask, wish)])


def open_slides(source: Path, wish: Wish) -> Opened:
    """Tiles of whole slides, by grid and tissue, with a table: slide, subject, and what else is known."""
    wish = wish.model_copy(update={"modality": wish.modality or Modality.SLIDE})
    return _open_table(source, wish, "slide", lambda path, mask: cut_slide(path, mask, wish))


def _open_table(
    source: Path, wish: Wish, column: str, load: Callable[[Path, Path | None], Iterable[Plane]]
) -> Opened:
    tables = [source] if source.is_file() else sorted(source.glob("*.csv"))
    insist(len(tables) == 1, f"There are {len(tables)} CSV files.", "Name the one that lists the images.")
    folder, label = tables[0].parent, wish.label_column or "label"
    rows = read_table(tables[0], (column, "subject"), ("site", label, "mask", "split", *TOLD))

    def make(row: Any) -> Item:
        path, mask = inside(folder, row[column]), inside(folder, row["mask"]) if row.get("mask") else None
        return tell(row, wish, partial(load, path, mask), column == "slide")

    entries, modality = [(key, partial(make, row)) for key, row in rows], wish.modality or Modality.OTHER
    return Opened(len(rows), entries, wish.kind or Kind.CLASSIFICATION, modality, wish.classes)


def cut_slide(path: Path, mask: Path | None, wish: Wish) -> Iterator[Plane]:
    """Tiles, row by row, where enough of the glass is covered; the mask is a picture over the whole slide."""
    import openslide

    annotation = _read_mask(mask, wish) if mask else None
    rows, columns = wish.rows or TILE, wish.columns or TILE
    with openslide.open_slide(path) as slide:
        finest = float(slide.properties.get("openslide.mpp-x") or 0) / 1000 or wish.spacing_mm or 0.0
        step = (wish.spacing_mm or finest) / (finest or 1)  # finest pixels a pixel of a tile
        insist(step > 0.99, f"Its pixels are {finest} mm.", "Give a --spacing-mm that is not finer.")
        level = slide.get_best_level_for_downsample(step * 1.01)
        finer = step / slide.level_downsamples[level]
        size = max(1, round(columns * finer)), max(1, round(rows * finer))
        if annotation is not None:
            shares = annotation.shape[0] / slide.dimensions[1], annotation.shape[1] / slide.dimensions[0]
            even = abs(shares[0] - shares[1]) <= 0.02 * shares[0]
            insist(even, f"Its mask is {annotation.shape}, the slide otherwise.", "Draw it over all of it.")
        glass = np.asarray(flatten(slide.get_thumbnail((1024, 1024))).convert("HSV"))[..., 1]
        kept, (width, height), high, wide = 0, slide.dimensions, int(rows * step), int(columns * step)
        for top, left in product(range(0, height - high + 1, high), range(0, width - wide + 1, wide)):
            down = (top + (np.arange(rows) + 0.5) * step) / height
            across = (left + (np.arange(columns) + 0.5) * step) / width
            if (_nearest(glass, down, across) > TISSUE).mean() >= wish.tissue:
                kept += 1
                tile = flatten(slide.read_region((left, top), level, size)).resize((columns, rows))
                shown = None if annotation is None else _nearest(annotation, down, across)
                yield Plane(np.asarray(tile), shown, finest * step)
    insist(kept, "No tile has enough tissue.", "Lower --tissue, or leave the slide out.")


def _nearest(field: NDArray[Any], down: NDArray[Any], across: NDArray[Any]) -> NDArray[Any]:
    """Values of a field at shares of its height and width."""
    return field[np.ix_((down * field.shape[0]).astype(int), (across * field.shape[1]).astype(int))]


def flatten(picture: Any) -> Any:
    """RGB of an RGBA region; what was not scanned is white."""
    from PIL import Image as Pillow

    white = Pillow.new("RGBA", picture.size, "white")
    return Pillow.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
