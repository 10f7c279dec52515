"""Models that were trained elsewhere: ONNX, weights or a MONAI bundle, and the contract that they get."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from imaging.config import Places, explain, read_params
from imaging.errors import ConfigError, DataError, TrustError
from imaging.manifest import digest_file
from imaging.recipe import Architecture, Section, TaskSection
from registry.bundles import OWN
from registry.intake import Bundle, open_bundle, read_network
from registry.outputs import PREPARED
from registry.package import Contract, combine_digests

WEIGHTS = (".safetensors", ".pt", ".pth")
AGREED = ("kind", "modality", "classes", "positive", "preparation")  # the cohort is prepared by the task's
CALIBRATED = {"temperature": 1.0, "threshold": 0.5}  # or frozen on this house's validation, if untold
SECONDS, MEMORY = 300, 6 * 2**30  # of a conversion
ERRORS = {error.__name__: error for error in (ConfigError, DataError, TrustError)}  # that it may end with
TOLD_LATER = {"lineage": {}, "simulated": "", "limits": ()}


class Terms(Section):
    """What a contract file may say beside the contract.

    Attributes:
        value_range: what the network takes for a prepared image's -1 and 1; a bundle's metadata may tell it.
        architecture: of a state dict, as in params.yaml; the task's own unless told.
        network: of a state dict, MONAI's `_target_` and arguments; of a bundle, the key of its configuration
            that alone is read.
    """

    value_range: tuple[float, float] | None = None
    architecture: Architecture | None = None
    network: dict[str, Any] | str | None = None


class Conversion(Section):
    """What is to be converted.

    Attributes:
        source: an ONNX file, or a state dict (.safetensors, .pt, .pth).
        contract: what the model shall promise.
        value_range: what its network takes for prepared images of -1 to 1.
        architecture: of a state dict of this house.
        network: class and arguments of a state dict of MONAI, as `read_network` checked them.
    """

    source: Path
    contract: Contract
    value_range: tuple[float, float] = PREPARED
    architecture: Architecture | None = None
    network: dict[str, Any] | None = None


@dataclass(frozen=True)
class Imported:
    """A model that was imported, as var/imports keeps it.

    Attributes:
        folder: with model.onnx, weights.safetensors and maybe program.pt2.
        contract: as far as it was told: without temperature or threshold where nobody told them.
        lineage: imported (sha256 of the source), file (its name) and told (where it comes from).
    """

    folder: Path
    contract: dict[str, Any]
    lineage: dict[str, str]


def import_model(places: Places, task: str, source: Path, contract: Path | None, because: str) -> Path:
    """Convert a foreign model for a task, and keep it under the digest of what was made of it.

    Args:
        places: of the checkout.
        task: a task of params.yaml.
        source: an .onnx, a state dict (.safetensors, .pt, .pth), or a MONAI bundle (a folder or .zip).
        contract: YAML or JSON: `Contract`'s keys and `Terms`'; params.yaml and a bundle's metadata fill in.
        because: where the model comes from, in a sentence; it stands in the package.

    Returns:
        Its folder, below var/imports.

    Raises:
        ConfigError: the contract lacks something, or is not the task's; or the weights do not fit.
        DataError: the source is damaged or too large.
        TrustError: it would run code, leave its folder, or does not answer as promised.
    """
    section = read_params(places).task(task)
    imports = places.var / "imports"
    imports.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=imports, prefix="draft-") as name:
        scratch = Path(name)
        given, terms = _read_terms(contract)
        found = _find(source, scratch, terms)
        told, value_range = _complete(task, section, (given, terms), found.metadata)
        asked = Conversion(
            source=found.file.resolve(), contract=check_contract(task, section, {**CALIBRATED, **told}),
            value_range=value_range, network=found.network,
            architecture=None if found.network else _bare(terms.architecture or section.fit.architecture),
        )  # fmt: skip
        notes = _convert(asked, scratch)
        made, told = scratch / "made", {**told, "limits": [*told["limits"], *notes]}
        if not (made / "program.pt2").exists():
            told["tolerance"] = {name: far for name, far in told["tolerance"].items() if "torch/" not in name}
        lineage = {"imported": f"sha256:{found.digest}", "file": source.name, "told": because}
        facts = {
            "contract": told,
            "lineage": lineage,
            **asked.model_dump(mode="json", include={"value_range", "network"}),
        }
        (made / "import.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        target = imports / _digest(made)
        if not target.exists():
            made.rename(target)
    return target


def read_import(folder: Path) -> Imported:
    """Open what `import_model` made.

    Raises:
        TrustError: it is not there, or was changed since.
    """
    if not (folder / "import.json").is_file() or _digest(folder) != folder.resolve().name:
        raise TrustError(
            f"{folder} holds no import, or was changed.", "Run `formulary registry import` again."
        )
    facts = json.loads((folder / "import.json").read_text())
    return Imported(folder, facts["contract"], facts["lineage"])


def list_params(section: TaskSection, lineage: dict[str, str]) -> dict[str, Any]:
    """The parameters that a package rests on: of an imported model its source in place of `fit`."""
    told = section.model_dump(mode="json")
    return {**told, "fit": {"imported": lineage["imported"]}} if "imported" in lineage else told


def _digest(folder: Path) -> str:
    files = {path.name: digest_file(path) for path in folder.iterdir()}
    return combine_digests(files).removeprefix("sha256:")


def _read_terms(path: Path | None) -> tuple[dict[str, Any], Terms]:
    if path is None:
        return {}, Terms()
    try:
        told = yaml.safe_load(path.read_text())
        own = {name: told.pop(name) for name in Terms.model_fields if name in told}
        return told, Terms.model_validate(own)
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no YAML with keys.", "Write the contract as YAML or JSON.") from error
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {explain(error, Terms)}.", "Mend the key.") from error


def _find(source: Path, scratch: Path, terms: Terms) -> Bundle:
    """What is to be converted, as a bundle that may have no metadata."""
    if source.is_dir() or source.suffix == ".zip":
        if isinstance(terms.network, dict):
            raise ConfigError("`network` defines a network.", "Of a bundle, name the key that has it.")
        return open_bundle(source, scratch, terms.network)
    if source.suffix not in (".onnx", *WEIGHTS) or not source.is_file():
        raise DataError(f"{source} is no model that can be imported.",
                        f"Give .onnx, {', '.join(WEIGHTS)}, or a MONAI bundle, folder or .zip.")  # fmt: skip
    network = read_network(terms.network, "network") if terms.network and source.suffix in WEIGHTS else None
    return Bundle(source, digest_file(source), network)


def _complete(
    task: str, section: TaskSection, given: tuple[dict[str, Any], Terms], metadata: dict[str, Any]
) -> tuple[dict[str, Any], tuple[float, float]]:
    """The contract as far as it can be known, and the range of values that the network takes."""
    check, package = section.check, section.package
    known: dict[str, Any] = {
        **TOLD_LATER, "title": section.title, "kind": section.kind, "modality": section.modality,
        "classes": section.classes, "positive": tuple(section.classes[i] for i in section.positive_labels),
        "depth": 0, "spacing_low_mm": check.spacing_low_mm, "spacing_high_mm": check.spacing_high_mm,
        "png_offset": package.png_offset, "max_batch": package.max_batch, "preparation": section.preparation,
        "tolerance": package.tolerance, "intended_use": package.intended_use,
    }  # fmt: skip
    told, told_range = _read_metadata(metadata)
    known |= {**told, **given[0], "task": task, "lineage": {}}
    value_range = given[1].value_range or told_range
    untold = {*CALIBRATED} - {*known}
    missing = sorted({*Contract.model_fields} - {*known} - (untold if len(untold) > 1 else set()))
    missing += ["value_range"] * (value_range is None)
    if missing or value_range is None:
        raise ConfigError(f"The contract lacks {', '.join(missing)}.", "Add them to the file of --contract.")
    whole = check_contract(task, section, {**CALIBRATED, **known})
    return whole.model_dump(mode="json", exclude={"task", "lineage", *untold}), value_range


def _read_metadata(metadata: dict[str, Any]) -> tuple[dict[str, Any], tuple[float, float] | None]:
    """What metadata.json tells of a contract: all of it if the bundle was ours, else the image's shape."""
    if not metadata or isinstance(metadata.get(OWN), dict):
        return metadata.get(OWN, {}), PREPARED
    try:
        image = next(iter(metadata["network_data_format"]["inputs"].values()))
        spatial = [side for side in image["spatial_shape"] if isinstance(side, int)]
        told = {"channels": image["num_channels"], "intended_use": metadata.get("intended_use")}
        low_high = image["value_range"]
        value_range = (float(low_high[0]), float(low_high[1])) if low_high else None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, StopIteration) as error:
        fix = "Describe its input as MONAI's specification says."
        raise DataError("metadata.json does not tell what the network takes.", fix) from error
    if len(spatial) in (2, 3):
        told |= dict(zip(("columns", "rows", "depth"), reversed(spatial), strict=False))
    return {name: value for name, value in told.items() if value is not None}, value_range


def check_contract(task: str, section: TaskSection, told: dict[str, Any]) -> Contract:
    """The contract, typed, and the task's where both speak.

    Raises:
        ConfigError: a key is wrong, or is not what params.yaml says.
    """
    try:
        contract = Contract.model_validate({"lineage": {}, **told, "task": task})
    except ValidationError as error:
        raise ConfigError(
            f"The contract: {explain(error, Contract)}.", "Mend the file of --contract."
        ) from error
    positive = tuple(section.classes[label] for label in section.positive_labels)
    for name in AGREED:
        ours = positive if name == "positive" else getattr(section, name)
        if getattr(contract, name) != ours:
            raise ConfigError(
                f"The contract says {name}: {getattr(contract, name)}, and {task} in params.yaml {ours}.",
                "Images are prepared and scored as the task says: mend one of them.",
            )
    return contract


def _bare(architecture: Architecture) -> Architecture:
    """Without files of pretrained weights: all weights come from the state dict."""
    members = tuple(_bare(member) for member in architecture.members)
    return architecture.model_copy(update={"pretrained": None, "members": members})


def _convert(asked: Conversion, scratch: Path) -> list[str]:
    """Make model.onnx, weights.safetensors and, where it can be, program.pt2 in the folder `made` of scratch.

    Returns:
        Sentences about what had to be derived, for the contract's limits.

    Raises:
        ConfigError, DataError, TrustError: it cannot be converted, or took more than it may.
    """
    for name in ("made", "home"):
        (scratch / name).mkdir()
    (scratch / "asked.json").write_text(asked.model_dump_json())
    root, told = Path(__file__).parents[1], scratch / "told.json"
    # Nothing of ours is handed on; -P: Python must not look for modules where foreign files lie.
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    env = {**kept, "HOME": str(scratch / "home"), "TMPDIR": str(scratch / "home"), "PYTHONPATH": str(root),
           "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # fmt: skip
    command = [*_isolate(), sys.executable, "-P", "-m", "registry.conversion", str(scratch)]
    try:
        done = subprocess.run(command, cwd=scratch / "home", env=env, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TrustError(f"Its conversion took longer than {SECONDS} s.", "Give a smaller model.") from error
    if not told.exists():
        raise TrustError(f"Its conversion was stopped (exit {done.returncode}).", "Give a smaller model.")
    found = json.loads(told.read_text())
    if "error" in found:
        raise ERRORS[found["error"]](found["fact"], found["fix"])
    return list(found["notes"])


def _isolate() -> list[str]:
    """What takes the network away from a command, where this host has it."""
    command = ["unshare", "--map-root-user", "--net", "--"]
    found = shutil.which("unshare")
    if found and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
        return command
    logging.getLogger(__name__).warning("This host cannot take the network away: the converter keeps it.")
    return []
