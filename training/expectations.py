"""What data must be before a model learns from them. The only place that knows Great Expectations.

Four tables are held to their rules: the manifest; the pixels behind each row, measured afresh; the subjects;
and the strata (split and site). Reports carry counts, never rows.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from imaging.errors import DataError
from imaging.manifest import Pixels, digest_pixels, read_manifest
from imaging.vocabulary import Kind, Severity, SiteKind, Split
from training.rules import Question, Rule, manifest_rules, pixel_rules, stratum_rules, subject_rules

NEAR_BITS, NEAR_CORRELATION, NEAR_BLOCK = 3, 0.99, 500
SUMMARY = ("element_count", "unexpected_count", "missing_count", "observed_value")


def check_cohort(question: Question, cohort: Path, split: Path, check: Path) -> dict[str, Any]:
    """Hold a split cohort to its expectations; write expectations.json and docs/index.html either way.

    Args:
        question: the task, the sites, and what the cohort knows.
        cohort: folder with the shards.
        split: folder with the manifest.
        check: what is written to; made if need be.

    Returns:
        The report: images, limits, expectations with what was observed, and the warnings.

    Raises:
        DataError: names every critical expectation that is not met, after the reports are written.
    """
    facts = yaml.safe_load((cohort / "cohort.yaml").read_text())
    question = replace(question, subject_split=bool(facts.get("subject_split", True)))
    manifest = read_manifest(split / "manifest.parquet")
    if "split" not in manifest:
        raise DataError(
            f"The manifest in {split} has no column split.", "Run `formulary training split` first."
        )
    pixels = measure_pixels(
        manifest, cohort, question.built or question.section.kind is not Kind.CLASSIFICATION
    )
    tables = {
        "manifest": (manifest, manifest_rules(question)),
        "pixels": (pixels, pixel_rules(question)),
        "subjects": (
            _list_subjects(manifest, question),
            subject_rules(question),
        ),
        "strata": (_list_strata(manifest, pixels, question), stratum_rules(question)),
    }
    check.mkdir(parents=True, exist_ok=True)
    results = _validate(question.task, tables, check / "docs")
    unmet: dict[str, list[str]] = {level: [] for level in Severity}
    for result in results:
        if not result["success"]:
            count = f" ({result['observed'].get('unexpected_count', 'all')} of {len(manifest)} images)"
            warned = result["severity"] == Severity.WARNING
            told = f"{result['table']}: {result['expectation']}{count if warned else ''}"
            unmet[result["severity"]].append(told)
    failed = unmet[Severity.CRITICAL]
    report = {"success": not failed, "images": len(manifest), "failed": failed,
              "warnings": unmet[Severity.WARNING], "limits": facts.get("limits", []),
              "expectations": results}  # fmt: skip
    (check / "expectations.json").write_text(json.dumps(report, indent=1) + "\n")
    if failed:
        raise DataError(
            f"{len(failed)} of {len(results)} expectations of {question.task} fail: {'; '.join(failed)}.",
            f"Mend the cohort, or the section check in params.yaml; see {check / 'docs' / 'index.html'}.",
        )
    return report


def measure_pixels(manifest: Any, cohort: Path, masked: bool = True) -> Any:
    """Measure every image and mask afresh: one row an image, in the manifest's order.

    Args:
        manifest: with splits.
        cohort: folder with the shards.
        masked: whether every image must have a mask.

    Raises:
        DataError: a shard or a row of it is missing.
    """
    import pandas as pd

    shards = Pixels(cohort)
    keys = ("image", "mask", "row", "label", "sha256")
    rows = (dict(zip(keys, values, strict=True)) for values in manifest[list(keys)].itertuples(index=False))
    table = pd.DataFrame([_measure(row, shards, masked) for row in rows])
    table["splits"] = manifest["split"].groupby(table["digest"]).transform("nunique")
    table["past"] = manifest["acquired"].astype(str).to_numpy() <= date.today().isoformat()
    prints = np.stack(table["thumbnail"].tolist())
    table["unlike"] = ~find_near_duplicates(prints, manifest["split"].to_numpy())
    return table.drop(columns=["digest", "thumbnail"])


def find_near_duplicates(thumbnails: NDArray[np.float32], splits: NDArray[Any]) -> NDArray[np.bool_]:
    """Which images look like one of another split: equal to three bits of 63, and correlated by .99.

    Args:
        thumbnails: float32 (n, 16, 16).
        splits: of each image, (n,).

    Returns:
        (n,). The hash is the sign of the 63 lowest waves against their median (DCT, Zauner 2010); the
        embedding is the thumbnail itself, its mean taken away, to length 1.
    """
    from scipy.fft import dctn

    waves = dctn(thumbnails, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(thumbnails), -1)[:, 1:]
    bits = waves > np.median(waves, axis=1, keepdims=True)
    hashes = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)[:, 0]
    flat = thumbnails.reshape(len(thumbnails), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    found = np.zeros(len(hashes), dtype=bool)
    for start in range(0, len(hashes), NEAR_BLOCK):
        part = slice(start, start + NEAR_BLOCK)
        close = np.bitwise_count(hashes[part, None] ^ hashes[None]) <= NEAR_BITS
        alike = flat[part] @ flat.T >= NEAR_CORRELATION
        found[part] = (close & alike & (splits[part, None] != splits[None])).any(axis=1)
    return found


def _thumbnail(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """The image at 16 x 16, by block means; of a volume its middle slice, of colours their mean."""
    grey = pixels.astype(np.float32)
    if grey.ndim == 3:
        grey = grey.mean(axis=-1) if grey.shape[-1] == 3 else grey[len(grey) // 2]
    rows, columns = (np.linspace(0, size, 17).astype(int)[:16] for size in grey.shape)
    sums = np.add.reduceat(np.add.reduceat(grey, rows, axis=0), columns, axis=1)
    counts = np.outer(np.diff([*rows, grey.shape[0]]), np.diff([*columns, grey.shape[1]]))
    return np.asarray(sums / np.maximum(counts, 1), dtype=np.float32)


def _measure(row: dict[str, Any], shards: Pixels, masked: bool) -> dict[str, Any]:
    """Facts of one image and its mask (highest label -1 if it is missing); classes seen are a bit each."""
    pixels = shards.read(row["image"], row["row"])
    mask = shards.read(row["mask"], row["row"]) if isinstance(row["mask"], str) else None
    digest, marked = digest_pixels(pixels), mask is not None and bool(mask.any())
    unlabelled = mask is None or row["label"] is None or row["label"] != row["label"]
    spatial = pixels.shape[:2] if pixels.shape[-1] == 3 else pixels.shape
    return {
        "digest": digest,
        "digest_holds": digest == row["sha256"],
        "shape": "x".join(map(str, pixels.shape)),
        "type": pixels.dtype.name,
        "finite": bool(np.isfinite(pixels).all()),
        "lowest": float(pixels.min()),
        "highest": float(pixels.max()),
        "thumbnail": _thumbnail(pixels),
        "mask_fits": (mask is None and not masked) or (mask is not None and mask.shape == spatial),
        "mask_highest": int(mask.max()) if mask is not None else -1,
        "mask_classes": sum(1 << int(label) for label in np.unique(mask) if label < 63)
        if mask is not None
        else 0,
        "mask_agrees": (marked or mask is None) if unlabelled else marked == bool(row["label"]),
    }


def _list_subjects(manifest: Any, question: Question) -> Any:
    """One row a subject: how many splits, sites and labels it has, and whether they fit sites.yaml."""
    how, sites = question.section.split, question.sites.sites
    declared = manifest["site"].map({name: site.kind.value for name, site in sites.items()})
    external = (declared == SiteKind.EXTERNAL) | manifest["site"].isin(how.left_out)
    apart = (manifest["split"] == Split.EXTERNAL) == external
    local = manifest["site"].isin(how.local) & (manifest["split"] != Split.TEST)
    table = manifest.assign(kind_holds=declared == manifest["site_kind"], side_holds=apart | local)
    groups = table.groupby("subject")
    return groups.agg(
        splits=("split", "nunique"), sites=("site", "nunique"), sexes=("sex", "nunique"),
        kind_holds=("kind_holds", "all"), side_holds=("side_holds", "all"),
    ).reset_index(drop=True)  # fmt: skip


def _list_strata(manifest: Any, pixels: Any, question: Question) -> Any:
    """One row a split and site: how many subjects, and how many classes (in validation: of all sites)."""
    seen = pixels["mask_classes"].to_numpy()
    if question.section.kind is Kind.CLASSIFICATION:
        known = range(len(question.section.classes))
        seen = [1 << int(label) if label in known else 0 for label in manifest["label"]]
    groups = manifest.assign(seen=seen).groupby(["split", "site"])
    strata = groups.agg(subjects=("subject", "nunique"), seen=("seen", np.bitwise_or.reduce))
    pooled = strata.index.get_level_values("split") == Split.VALIDATION  # one operating point for all sites
    if len(question.section.classes) > 2 or not question.built:  # rare classes are not at every site
        strata["seen"] = strata.groupby("split")["seen"].transform(np.bitwise_or.reduce)
    strata.loc[pooled, "seen"] = np.bitwise_or.reduce(strata.loc[pooled, "seen"].to_numpy())
    return strata.assign(classes=strata["seen"].map(int.bit_count)).reset_index()


def _validate(task: str, tables: dict[str, tuple[Any, list[Rule]]], docs: Path) -> list[dict[str, Any]]:
    """Run the suites in an ephemeral context, one checkpoint a table, and build the pages."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the library is imported
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    for site in list(context.get_site_names()):
        context.delete_data_docs_site(site)
    context.add_data_docs_site(
        "check",
        {
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str(docs.resolve()),
            },
        },
    )
    source = context.data_sources.add_pandas(task)
    results = [row for name, part in tables.items() for row in _validate_table(context, source, name, part)]
    context.build_data_docs(site_names=["check"])
    return results


def _validate_table(
    context: Any, source: Any, name: str, part: tuple[Any, list[Rule]]
) -> list[dict[str, Any]]:
    """Validate one table."""
    import great_expectations as gx

    frame, rules = part
    batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe(name)
    suite = context.suites.add(gx.ExpectationSuite(name=name))
    for rule in rules:
        expectation = getattr(gx.expectations, rule.kind)(
            description=rule.sentence, severity=rule.severity.value, **rule.options
        )
        suite.add_expectation(expectation)
    definition = gx.ValidationDefinition(name=name, data=batch, suite=suite)
    checkpoint = gx.Checkpoint(
        name=name,
        validation_definitions=[context.validation_definitions.add(definition)],
        result_format={"result_format": "SUMMARY", "partial_unexpected_count": 0},  # no values of a row
    )
    outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame})
    (validation,) = outcome.run_results.values()
    return [_summarise(name, result, rules) for result in validation.results]


def _summarise(table: str, result: Any, rules: list[Rule]) -> dict[str, Any]:
    """One expectation's outcome for expectations.json."""
    sentence = result.expectation_config.description
    return {
        "table": table,
        "expectation": sentence,
        "severity": next(rule.severity.value for rule in rules if rule.sentence == sentence),
        "column": result.expectation_config.kwargs.get("column"),
        "success": bool(result.success),
        "observed": {key: result.result[key] for key in SUMMARY if key in result.result},
    }
