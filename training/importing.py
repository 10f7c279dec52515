"""An import: entries of any format become a cohort folder, streamed, resumable, whole or not there at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from imaging.config import Places, Sites, explain, read_sites
from imaging.errors import ConfigError, DataError
from imaging.manifest import COLUMNS, read_manifest
from imaging.recipe import TaskSection
from imaging.vocabulary import Kind, SiteKind
from monitoring.journal import pseudonym
from registry.policy import Policy
from training.formats import open_csv, open_medmnist, open_slides
from training.items import UNSPACED, Intake, Opened, Wish, readable
from training.scans import open_bids, open_dicom, open_msd

MOST = 20  # refusals that are collected before an import gives up
JOURNAL = "journal.jsonl"
TEMPLATES = Path(__file__).parent / "templates"
NETWORKS = {Kind.CLASSIFICATION: "cnn", Kind.SEGMENTATION: "unet", Kind.DETECTION: "detector"}
EVERYWHERE = {"licence", "site", "classes", "modality", "pseudonyms", "redistributable", "simulated"}
VOLUMES = {"volumes", "rows", "columns", "depth", "every", "spacing_mm", "store"}
TABLED = {"rows", "columns", "spacing_mm", "label_column", "kind"}
FORMATS = {
    "medmnist": (open_medmnist, {"label_column", "store"}),
    "msd": (open_msd, VOLUMES | {"channel", "labels", "kind"}),
    "dicom": (open_dicom, VOLUMES | {"labels"}),
    "bids": (open_bids, VOLUMES | {"channel", "suffix", "mask_suffix", "label_column", "kind"}),
    "csv": (open_csv, TABLED | {"volumes", "depth", "store"}),
    "slides": (open_slides, TABLED | {"tissue"}),
}
"""Of each format what opens it, and which options it takes beside those that are taken everywhere."""


class Order(NamedTuple):
    """One import."""

    format: str  # of `FORMATS`
    source: Path  # what is read; never written to
    out: str  # folder of the cohort, from the root of the checkout
    wish: Wish
    again: bool = False  # replace a finished import, once the new one is whole
    skip_refused: bool = False  # leave out what is refused, and list it, instead of giving up
    dry_run: bool = False  # write nothing


def make_wish(name: str, options: dict[str, Any], sites: Sites) -> Wish:
    """Options of the command, as text or typed, as a wish.

    Raises:
        ConfigError: one of them is out of range, or the format has no use for it.
    """
    told = {option: value for option, value in options.items() if value not in (None, False)}
    used = EVERYWHERE | FORMATS[name][1] - ({"every"} if "volumes" in told else {"depth"})
    if strange := sorted(set(told) - used):
        raise ConfigError(f"{name} has no use for {', '.join(strange)} here.", "Leave the option out.")
    if isinstance(told.get("classes"), str):
        told["classes"] = tuple(map(str.strip, told["classes"].split(",")))
    try:
        return Wish.model_validate({"site": sites.names(SiteKind.INTERNAL)[0]} | told)
    except ValidationError as error:
        raise ConfigError(f"{explain(error, Wish)}.", "Mend the option; nothing was imported.") from error


def import_cohort(order: Order, places: Places) -> tuple[Intake, dict[str, str]]:
    """Import a source, or go on where an import of it was killed.

    Returns:
        What was taken and refused, and the texts of task.yaml and policy.yaml.

    Raises:
        ConfigError: the options do not fit, or the import is finished already.
        DataError: something was refused (up to 20 are named), or there is nothing to take.
    """
    sites, out = read_sites(places), places.root / order.out
    opened = _open(order, out, sites)
    if order.dry_run:
        return _run(order, opened, Intake(opened, sites, None), None), {}
    part = out.with_name(f".{out.name}.part")

    def name(subject: str) -> str:
        hides = opened.pseudonyms or order.wish.pseudonyms
        return pseudonym(places.var, order.wish.site, subject)[:16] if hides else subject

    with _begin(part, _fingerprint(order, sites)) as journal:
        told = _run(order, opened, Intake(opened, sites, part, name), journal)
        if not told.rows or (told.refused and not order.skip_refused):
            shutil.rmtree(part)
            first = "".join(f"\n  {where}: {why}" for where, why in told.refused[:MOST])
            fact = f"Nothing is imported; {len(told.refused)} refused (the first {MOST} at most):{first}\n"
            raise DataError(fact, "Mend the source, or leave them out with --skip-refused.")
        texts = _finish(order, opened, told, part)
        (part / JOURNAL).unlink()
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    return told, texts


def _open(order: Order, out: Path, sites: Sites) -> Opened:
    """Look the source over, once its place and site are known to be right."""
    sites.site(order.wish.site)
    if not re.fullmatch(r"(?:[\w-]+/)+[a-z][a-z0-9-]*", order.out):
        raise ConfigError(f"--out {order.out!r} is no folder of the checkout.", "Name it as data/my-task.")
    if out.exists() and not order.again and not order.dry_run:
        raise ConfigError(f"{order.out} is finished.", "Choose another --out, or replace it with --again.")
    with readable(order.source.name):
        opened = FORMATS[order.format][0](order.source, order.wish)
    if len(set(opened.classes)) < max(2, len(opened.classes)):
        raise ConfigError("The classes are not known.", "Name two or more: --classes healthy,tumour.")
    return opened


def _fingerprint(order: Order, sites: Sites) -> bytes:
    """Of all that decides an import's bytes: when it changes, a killed import starts again."""
    root = order.source.parent if order.source.suffix == ".csv" else order.source  # its images lie beside it
    files = [root, *sorted(root.rglob("*")), *filter(None, [order.wish.labels])]
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    texts = order.wish.model_dump_json(), sites.model_dump_json(), order.format, order.skip_refused
    return hashlib.sha256(json.dumps([texts, facts]).encode()).hexdigest().encode() + b"\n"


@contextmanager
def _begin(part: Path, fingerprint: bytes) -> Iterator[BinaryIO]:
    """The journal of an import, for one process at a time: the fingerprint, then a line an item."""
    part.mkdir(parents=True, exist_ok=True)
    with (part / JOURNAL).open("a+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"Another process imports to {part}.", "Wait for it.") from error
        journal.seek(0)
        if journal.readline() != fingerprint:
            for path in part.glob("*.npy"):
                path.unlink()
            journal.truncate(0)
            journal.write(fingerprint)
        yield journal


def _run(order: Order, opened: Opened, intake: Intake, journal: BinaryIO | None) -> Intake:
    """Take every item that the journal does not name, or as many as it needs to refuse 20."""
    from rich.console import Console
    from rich.progress import track

    done = 0
    while journal and (line := journal.readline()):
        if not line.endswith(b"\n"):  # the process was killed while it wrote this one
            journal.truncate(journal.tell() - len(line))
            break
        intake.keep(json.loads(line))
        done += 1
    entries = track(opened.entries, "Importing", opened.total, console=Console(stderr=True))
    with readable(order.source.name):
        for key, make in islice(entries, done, None):
            told = intake.take(key, make)
            if journal:
                journal.write(json.dumps(told).encode() + b"\n")
                journal.flush()
            if len(intake.refused) >= MOST and not order.skip_refused:
                break
    return intake


def _finish(order: Order, opened: Opened, told: Intake, part: Path) -> dict[str, str]:
    """Cut the last shards, write the tables and cohort.yaml, and propose the rest."""
    import pandas as pd

    shared = order.wish.model_dump(include={"licence", "simulated", "redistributable"})
    shared["modality"] = opened.modality.value
    table = pd.DataFrame(list(told.rows.values())).assign(**shared).rename(columns={"split": "given_split"})
    columns = [*COLUMNS, "given_split"] if table["given_split"].notna().any() else list(COLUMNS)
    table[columns].to_parquet(part / "manifest.parquet", index=False)
    kept = pd.concat([table.groupby(column)["row"].max() + 1 for column in ("image", "mask")])
    for path in part.glob("*.npy"):
        _cut(path, kept.get(path.name, 0))
    if told.refused and not (opened.pseudonyms or order.wish.pseudonyms):  # paths may name people
        pd.DataFrame(told.refused, columns=["where", "why"]).to_csv(part / "refused.csv", index=False)
    facts = _describe(order, opened, told, table, np.load(part / "images-0000.npy", mmap_mode="r"))
    (part / "cohort.yaml").write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=100))
    return propose(facts | {"source": order.out}, table, part)


def _cut(path: Path, rows: int) -> None:
    """Leave so many rows of a shard, or no shard."""
    shard, draft = np.load(path, mmap_mode="r"), path.with_name("draft")
    if not rows:
        path.unlink()
    elif rows < len(shard):
        with draft.open("wb") as stream:
            np.save(stream, shard[:rows])
        draft.replace(path)


def _describe(order: Order, opened: Opened, told: Intake, table: Any, stored: NDArray[Any]) -> dict[str, Any]:
    """What cohort.yaml says."""
    wish, colour = order.wish, stored.ndim == 4 and stored.shape[-1] == 3
    *depth, rows, columns = stored.shape[1:-1] if colour else stored.shape[1:]
    made = "Imported images that are simulated." if wish.simulated else "Imported images; none is simulated."
    unspaced = ["The size of a pixel is not known: 1 mm stands for it."] if told.notes[UNSPACED] else []
    return {
        "name": Path(order.out).name, "version": "1", "task": Path(order.out).name, "kind": opened.kind.value,
        "modality": opened.modality.value, "classes": list(opened.classes), "channels": 3 if colour else 1,
        "depth": depth[0] if depth else 0, "rows": rows, "columns": columns, "stored": stored.dtype.name,
        "spacing_mm": float(table["spacing_mm"].mean()), "licence": wish.licence, "source": order.source.name,
        "simulated": wish.simulated, "simulation": made, "limits": [*opened.limits, *unspaced],
        "subject_split": opened.subject_split, "images": len(table), "subjects": len(told.subjects),
        "refused": len(told.refused), "notes": dict(sorted(told.notes.items())),
    }  # fmt: skip


def propose(facts: dict[str, Any], table: Any, folder: Path) -> dict[str, str]:
    """Write task.yaml, to be appended to params.yaml, and policy.yaml, from cohort.yaml and the manifest."""
    from jinja2 import Environment

    kind, sides = Kind(facts["kind"]), [facts[name] for name in ("depth", "rows", "columns") if facts[name]]
    halves = min((side & -side).bit_length() for side in sides)  # a U-Net must come back to its sides
    levels = {Kind.CLASSIFICATION: min(sides).bit_length() - 2, Kind.SEGMENTATION: halves}.get(kind, 2)
    floats = facts["stored"] == "float32"
    info = np.finfo("float32") if floats else np.iinfo(facts["stored"])
    low, high = (table["low"].min(), table["high"].max()) if floats else (info.min, info.max)
    words = facts | {"network": NETWORKS[kind], "levels": max(2, min(4, levels)), "low": low, "high": high,
                     "finest": table["spacing_mm"].min(), "coarsest": table["spacing_mm"].max()}  # fmt: skip
    texts = {}
    for file in ("task.yaml", "policy.yaml"):
        page = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        texts[file] = page.from_string((TEMPLATES / file).read_text()).render(words)
        (folder / file).write_text(texts[file])
    TaskSection.model_validate(yaml.safe_load(texts["task.yaml"])[facts["name"]])
    Policy.model_validate(yaml.safe_load(texts["policy.yaml"]))
    return texts


def link_import(source: Path, folder: Path) -> None:
    """What the cohort stage does for an import: copy it; `check` then holds each image to its digest.

    Raises:
        DataError: it is not a finished import, or a shard is missing.
    """
    if not (source / "cohort.yaml").is_file():
        fix = "Run `formulary training import`, or `dvc checkout`."
        raise DataError(f"{source} is not a finished import.", fix)
    table = read_manifest(source / "manifest.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for name in {"manifest.parquet", "cohort.yaml", *table["image"], *table["mask"].dropna()}:
        if not (path := source / Path(name).name).is_file():
            raise DataError(f"The shard {path} is missing.", "Import again, or `dvc checkout`.")
        shutil.copyfile(path, folder / path.name)
