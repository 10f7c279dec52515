"""Formats of scanners: the Decathlon and BIDS (NIfTI), and DICOM series; each becomes upright volumes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imaging.errors import FormularyError
from imaging.reading import LITTLE_ENDIAN
from imaging.vocabulary import Kind, Modality
from training.formats import centre, read_labels, read_people, read_table, refuse_unseen, store, tell
from training.items import Item, Opened, Plane, Wish, inside, insist, readable, refuse

TILTED = 0.01  # radians off the body's axes from which a volume is resampled
UNEVEN = 0.05  # share of the slice distance by which a distance may differ
NEEDED = ("PatientID", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
MACHINES = {"CT": Modality.CT, **dict.fromkeys(("MR", "T1", "T2", "FL", "AD"), Modality.MR)}
"""How Decathlon's names of modalities begin."""


def open_msd(source: Path, wish: Wish) -> Opened:
    """A task of the Medical Segmentation Decathlon: dataset.json, imagesTr, labelsTr."""
    facts = json.loads((source / "dataset.json").read_text())
    classes = wish.classes or tuple(facts["labels"][str(number)] for number in range(len(facts["labels"])))
    machine = str(facts.get("modality", {}).get(str(wish.channel or 0), "")).upper()
    modality = wish.modality or MACHINES.get(machine[:2], Modality.OTHER)
    insist(wish.modality or machine[:2] in MACHINES, f"Its modality is {machine!r}.", "Name it: --modality.")
    wish = wish.model_copy(update={"classes": classes, "modality": modality})
    people, entries = read_labels(wish)
    subjects = [Path(entry["image"]).name.split(".nii")[0] for entry in facts["training"]]

    def make(entry: dict[str, str], subject: str) -> Item:
        insist(entry.get("label"), "It names no label file.", "Add it, or leave the entry out.")
        image, mask = inside(source, entry["image"]), inside(source, entry["label"])
        row = people.get(subject, {"subject": subject})
        return tell(row, wish, partial(_read_volume, image, mask, wish))

    entries += refuse_unseen(people, set(subjects))
    for number, (entry, subject) in enumerate(zip(facts["training"], subjects, strict=True)):
        entries.append((f"dataset.json training[{number}] {entry['image']}", partial(make, entry, subject)))
    left_out, kind = {"unlabelled test images": len(facts.get("test", []))}, wish.kind or Kind.SEGMENTATION
    return Opened(len(entries), entries, kind, modality, classes, (), left_out)


def open_bids(source: Path, wish: Wish) -> Opened:
    """A BIDS folder: participants.tsv, sub-*/[ses-*/]anat/*_SUFFIX.nii.gz, masks there or in derivatives."""
    needed = ("participant_id", *filter(None, [wish.label_column]))
    people, entries = read_people(read_table(source / "participants.tsv", needed, None), "participant_id")
    wish = wish.model_copy(update={"modality": wish.modality or Modality.MR})
    images = [path.relative_to(source) for path in sorted(source.glob(f"sub-*/**/anat/*_{wish.suffix}.nii*"))]
    masks = [path.relative_to(source) for path in sorted(source.rglob(f"*_{wish.mask_suffix}.nii*"))
             if wish.mask_suffix]  # fmt: skip

    def make(name: Path) -> Item:
        image, stem = inside(source, str(name)), name.name.split(f"{wish.suffix}.nii")[0]
        insist(name.parts[0] in people, "It is not in participants.tsv.", "Add its row.")
        found = [inside(source, str(mask)) for mask in masks if mask.name.startswith(stem)]
        told = f"{len(found)} masks are called {stem}*{wish.mask_suffix}.nii.gz."
        insist(not wish.mask_suffix or len(found) == 1, told, "There must be one.")
        sidecar = image.with_name(f"{stem}{wish.suffix}.json")
        machine = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
        scanner = f"{machine.get('Manufacturer', '')} {machine.get('ManufacturersModelName', '')}"
        row = {"scanner": scanner} | people[name.parts[0]]
        return tell(row, wish, partial(_read_volume, image, found[0] if found else None, wish))

    entries += refuse_unseen(people, {name.parts[0] for name in images})
    for name in images:
        row = people.get(name.parts[0], {"key": "participants.tsv"})
        entries.append((f"{row['key']} {name}", partial(make, name)))
    kind = wish.kind or (Kind.SEGMENTATION if wish.mask_suffix else Kind.CLASSIFICATION)
    return Opened(len(entries), entries, kind, wish.modality or Modality.MR, wish.classes)


class Slice(NamedTuple):
    """A DICOM header: position in mm (patient), what a series has alike, and what is told of the person."""

    path: Path
    series: str
    position: tuple[float, ...]
    shared: dict[str, Any]
    told: dict[str, str]


def _only_modality(found: list[str]) -> Modality:
    """The one modality of a folder's series that the house knows, or OTHER."""
    known = sorted(set(found) & set(Modality))
    insist(len(known) < 2, f"The folder mixes {', '.join(known)}.", "Choose with --modality.")
    return Modality(next(iter(known), Modality.OTHER))


def open_dicom(source: Path, wish: Wish) -> Opened:
    """A folder of DICOM files in any order; a series is a volume, PatientID becomes a pseudonym."""
    from rich.console import Console
    from rich.progress import track

    series: dict[str, list[Slice]] = defaultdict(list)
    left_out, (people, entries) = Counter[str](), read_labels(wish)
    paths = sorted(path for path in source.rglob("*") if path.is_file() and path.name != "DICOMDIR")
    for path in track(paths, "Headers", console=Console(stderr=True)):
        name = str(path.relative_to(source))
        try:
            with readable():
                read = read_slice(inside(source, name))
        except FormularyError as error:
            entries.append(refuse(name, error.fact, error.fix))
            continue
        if isinstance(read, Slice):
            series[read.series].append(read)
        else:
            left_out[read] += 1
    found = [slices[0].shared["modality"] for slices in series.values()]
    modality = wish.modality or _only_modality(found)
    wanted = (modality, *found) if modality is Modality.OTHER else (modality,)
    kept = [slices for slices in series.values() if slices[0].shared["modality"] in wanted]
    left_out["series of another modality"] = len(series) - len(kept)
    wish = wish.model_copy(update={"modality": modality})

    def make(slices: list[Slice]) -> Item:
        row = slices[0].told | {"subject": slices[0].shared["patient"]}
        row |= {name: text for name, text in people.get(row["subject"], {}).items() if text}
        return tell(row, wish, partial(_read_series, slices, wish))

    entries += refuse_unseen(people, {slices[0].shared["patient"] for slices in kept})
    for slices in kept:
        name = f"{slices[0].path.relative_to(source)} ({len(slices)} slices)"
        entries.append((name, partial(make, slices)))
    return Opened(
        len(entries), entries, Kind.CLASSIFICATION, modality, wish.classes, (), left_out, True, True
    )


def read_slice(path: Path) -> Slice | str:
    """A DICOM file's header, or the sentence why the file is left out."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        data = pydicom.dcmread(path, stop_before_pixels=True)
    except InvalidDicomError:
        return "not a DICOM file"
    if "Rows" not in data or "LOCALIZER" in (data.get("ImageType") or ()):
        return "a localizer" if "Rows" in data else "not an image"
    syntax = data.file_meta.TransferSyntaxUID
    insist(syntax in LITTLE_ENDIAN, f"Transfer syntax {syntax.name[:60]} is not taken.", "Decompress it.")
    plain = int(data.get("NumberOfFrames") or 1) == 1 and data.PhotometricInterpretation == "MONOCHROME2"
    insist(plain, "It is not MONOCHROME2 of one frame.", "Send one grey slice a file.")
    missing = [name for name in NEEDED if not data.get(name)]
    insist(not missing, f"It lacks {', '.join(missing)}.", "Leave it out, or mend it.")
    along, down = np.reshape(data.ImageOrientationPatient, (2, 3)).astype(float)
    shared = {
        "patient": str(data.PatientID), "modality": str(data.get("Modality", "")),
        "size": (int(data.Rows), int(data.Columns)), "orientation": (*along, *down),
        "pixel spacing": tuple(map(float, data.PixelSpacing)),
    }  # fmt: skip
    dates = (str(data.get(f"{part}Date") or "") for part in ("Acquisition", "Series", "Study"))
    told = {"sex": str(data.get("PatientSex") or ""), "age": str(data.get("PatientAge") or ""),
            "acquired": next(filter(None, dates), ""), "thickness": str(data.get("SliceThickness") or 1),
            "scanner": f"{data.get('Manufacturer', '')} {data.get('ManufacturerModelName', '')}"}  # fmt: skip
    position = tuple(map(float, data.ImagePositionPatient))
    return Slice(path, str(data.SeriesInstanceUID), position, shared, told)


def _read_series(slices: list[Slice], wish: Wish) -> Iterator[Plane]:
    """A DICOM series, sorted by where its slices lie, in rescaled units (HU)."""
    import nibabel as nib
    import pydicom
    from pydicom.pixels.processing import apply_rescale

    shared = slices[0].shared
    for other in slices[1:]:
        wrong = [name for name, value in shared.items() if not _alike(value, other.shared[name])]
        told = f"{slices[0].path.name} and {other.path.name} have another {' and '.join(wrong)}."
        insist(not wrong, told, "One series has one.")
    along, down = np.reshape(shared["orientation"], (2, 3))
    normal = np.cross(along, down)
    slices = sorted(slices, key=lambda one: float(np.dot(normal, one.position)))
    step = _step(slices, normal)
    voxels = np.empty((*shared["size"][::-1], len(slices)), wish.voxels, order="F")
    for k, one in enumerate(slices):
        data = pydicom.dcmread(one.path)
        voxels[..., k] = store(apply_rescale(data.pixel_array, data), wish.voxels).T
    affine, (apart, beside) = np.eye(4), shared["pixel spacing"]
    affine[:3] = np.stack([along * beside, down * apart, step, slices[0].position], 1)
    affine[:2] *= -1  # DICOM counts to the left and to the back, NIfTI to the right and to the front
    yield from cut_volume(nib.Nifti1Image(voxels, affine), None, wish)


def _alike(one: Any, another: Any) -> bool:
    return bool(one == another or (isinstance(one, tuple) and np.allclose(one, another, atol=1e-4)))


def _step(slices: list[Slice], normal: NDArray[Any]) -> NDArray[Any]:
    """From a slice to the next, in mm, where all are equally far apart along the normal."""
    if len(slices) == 1:
        return normal * float(slices[0].told["thickness"])
    gaps = np.diff([np.dot(normal, one.position) for one in slices])
    typical = float(np.median(gaps))
    for gap, (before, after) in zip(gaps, pairwise(one.path.name for one in slices), strict=True):
        insist(gap > 1e-3, f"{before} and {after} lie in one place.", "Keep one of them.")
        insist(gap < 1.5 * typical, f"A slice is missing between {before} and {after}.", "Send all of them.")
        even = abs(gap - typical) <= UNEVEN * typical
        insist(even, f"{before} and {after} are {gap:g} mm apart, others {typical:g}.", "Resample it.")
    return (np.array(slices[-1].position) - slices[0].position) / len(gaps)


def _read_volume(image: Path, mask: Path | None, wish: Wish) -> Iterator[Plane]:
    """The planes of a NIfTI file and its mask."""
    truth = open_nifti(mask, "uint8", None, exact=True) if mask else None
    yield from cut_volume(open_nifti(image, wish.voxels, wish.channel), truth, wish)


def open_nifti(path: Path, wanted: str, channel: int | None, exact: bool = False) -> Any:
    """Read a NIfTI file slice by slice into a nibabel image of the wanted type."""
    import nibabel as nib

    image = nib.load(path, keep_file_open=True)  # slices of a .gz are then read in one pass
    kind, affine, chosen = image.get_data_dtype(), np.asarray(image.affine), channel or 0
    insist(kind.kind in "iuf", f"It holds {kind}.", "Write integers or floats, no colour.")
    channels = image.shape[3] if image.ndim == 4 else 1
    single = image.ndim in (3, 4) and chosen < channels and (channels == 1 or channel is not None)
    insist(single, f"It has shape {image.shape}.", "Send (i, j, k), or choose with --channel.")
    placed = int(image.header["sform_code"]) or int(image.header["qform_code"])
    valid = placed and np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9
    insist(valid, "It does not say how it lies.", "Write a valid affine as qform or sform.")
    voxels = np.empty(image.shape[:3], wanted, order="F")
    for k in range(image.shape[2]):
        part = np.asanyarray(image.dataobj[..., k] if image.ndim == 3 else image.dataobj[..., k, chosen])
        voxels[..., k] = store(part, wanted, exact)
    hounsfield = wanted != "int16" or part.dtype.kind != "f" or np.ptp(voxels) > 15
    insist(hounsfield, f"Its pixels, {voxels.min()} to {voxels.max()}, are no HU.", "Use --store float32.")
    return nib.Nifti1Image(voxels, affine)


def cut_volume(image: Any, mask: Any, wish: Wish) -> Iterator[Plane]:
    """Slices of a volume (a nibabel image, oblique too) and of its mask (uint8, or None), or the whole."""
    size = (wish.depth if wish.volumes else None, wish.rows, wish.columns)
    pixels, spacing = _upright(image, wish, 1)
    pixels, truth = centre(pixels, size, pixels.min()), None
    if mask is not None:
        fits = mask.shape == image.shape and np.allclose(mask.affine, image.affine, atol=1e-3)
        told = f"The mask, {mask.shape}, has another shape or place than the image, {image.shape}."
        insist(fits, told, "Resample the mask to the image.")
        truth = centre(_upright(mask, wish, 0)[0], size, 0)
    for k in [slice(None)] if wish.volumes else range(0, len(pixels), wish.every):
        yield Plane(np.ascontiguousarray(pixels[k]), None if truth is None else truth[k], spacing)


def _upright(image: Any, wish: Wish, order: int) -> tuple[NDArray[Any], float]:
    """Voxels (depth from the feet up, rows to posterior, columns to the left), and the distance of pixels."""
    import nibabel as nib
    from nibabel.affines import obliquity, voxel_sizes
    from nibabel.processing import resample_to_output
    from scipy.ndimage import gaussian_filter

    image = nib.as_closest_canonical(image)
    sizes = across, down, along = voxel_sizes(image.affine)
    square = wish.spacing_mm or abs(across - down) <= 0.01 * across
    insist(square, f"Its pixels are {down:g} x {across:g} mm.", "Make them square with --spacing-mm.")
    side = wish.spacing_mm or float(across)
    even = wish.spacing_mm or not wish.volumes or abs(along - side) <= 0.01 * side
    insist(even, f"Its slices are {along:g} mm apart, its pixels {side:g}.", "Even it with --spacing-mm.")
    wanted = (side, side, side if wish.volumes and wish.spacing_mm else along)
    if np.max(obliquity(image.affine)) > TILTED or not np.allclose(sizes, wanted, rtol=0.01):
        voxels = np.asanyarray(image.dataobj)
        if order:  # what is finer than the new grid would come back as false structure
            voxels = gaussian_filter(voxels, np.maximum(0, np.divide(wanted, sizes) - 1) / 2, mode="nearest")
        smooth = nib.Nifti1Image(voxels, image.affine)
        image = resample_to_output(smooth, wanted, order=order, cval=voxels.min() if order else 0)
    return np.asanyarray(image.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1], side
