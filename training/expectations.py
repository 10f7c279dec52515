"""What data must be before a model learns from them. The only place that knows Great Expectations.

Four tables are held to their rules: the manifest; the pixels behind each row, measured afresh; the subjects;
and the strata (split and site). Reports carry counts, never rows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from imaging.config import Sites
from imaging.errors import DataError
from imaging.manifest import Pixels, digest_pixels, read_manifest
from imaging.vocabulary import Kind, SiteKind, Split
from training.rules import Question, Rule, manifest_rules, pixel_rules, stratum_rules, subject_rules

SUMMARY = ("element_count", "unexpected_count", "missing_count", "observed_value")


def check_cohort(question: Question, cohort: Path, split: Path, check: Path) -> int:
    """Hold a split cohort to its expectations; write expectations.json and docs/index.html either way.

    Args:
        question: the task and the sites.
        cohort: folder with the shards.
        split: folder with the manifest.
        check: what is written to; made if need be.

    Returns:
        Number of expectations, all met.

    Raises:
        DataError: names every expectation that is not met, after the reports are written.
    """
    manifest = read_manifest(split / "manifest.parquet")
    if "split" not in manifest:
        raise DataError(
            f"The manifest in {split} has no column split.", "Run `formulary training split` first."
        )
    pixels = measure_pixels(manifest, cohort)
    tables = {
        "manifest": (manifest, manifest_rules(question)),
        "pixels": (pixels, pixel_rules(question)),
        "subjects": (_list_subjects(manifest, question.sites), subject_rules()),
        "strata": (_list_strata(manifest, pixels, question), stratum_rules(question)),
    }
    check.mkdir(parents=True, exist_ok=True)
    results = _validate(question.task, tables, check / "docs")
    failed = [f"{result['table']}: {result['expectation']}" for result in results if not result["success"]]
    report = {"success": not failed, "images": len(manifest), "failed": failed, "expectations": results}
    (check / "expectations.json").write_text(json.dumps(report, indent=1) + "\n")
    if failed:
        raise DataError(
            f"{len(failed)} of {len(results)} expectations of {question.task} fail: {'; '.join(failed)}.",
            f"Mend the cohort, or the section check in params.yaml; see {check / 'docs' / 'index.html'}.",
        )
    return len(results)


def measure_pixels(manifest: Any, cohort: Path) -> Any:
    """Measure every image and mask afresh: one row an image, in the manifest's order.

    Raises:
        DataError: a shard or a row of it is missing.
    """
    import pandas as pd

    shards = Pixels(cohort)
    keys = ("image", "mask", "row", "label", "sha256")
    rows = (dict(zip(keys, values, strict=True)) for values in manifest[list(keys)].itertuples(index=False))
    table = pd.DataFrame([_measure(row, shards) for row in rows])
    table["splits"] = manifest["split"].groupby(table["digest"]).transform("nunique")
    return table.drop(columns="digest")


def _measure(row: dict[str, Any], shards: Pixels) -> dict[str, Any]:
    """Facts of one image and its mask (highest label -1 if it is missing); classes seen are a bit each."""
    pixels = shards.read(row["image"], row["row"])
    mask = shards.read(row["mask"], row["row"]) if isinstance(row["mask"], str) else None
    digest, marked = digest_pixels(pixels), mask is not None and bool(mask.any())
    unlabelled = row["label"] is None or row["label"] != row["label"]
    return {
        "digest": digest,
        "digest_holds": digest == row["sha256"],
        "shape": "x".join(map(str, pixels.shape)),
        "type": pixels.dtype.name,
        "finite": bool(np.isfinite(pixels).all()),
        "lowest": float(pixels.min()),
        "highest": float(pixels.max()),
        "mask_fits": mask is not None and mask.shape == pixels.shape,
        "mask_highest": int(mask.max()) if mask is not None else -1,
        "mask_classes": int(np.bitwise_or.reduce(1 << np.unique(mask % 63))) if mask is not None else 0,
        "mask_agrees": marked if unlabelled else marked == bool(row["label"]),
    }


def _list_subjects(manifest: Any, sites: Sites) -> Any:
    """One row a subject: how many splits, sites and labels it has, and whether they fit sites.yaml."""
    declared = manifest["site"].map({name: site.kind.value for name, site in sites.sites.items()})
    table = manifest.assign(
        kind_holds=declared == manifest["site_kind"],
        side_holds=(manifest["split"] == Split.EXTERNAL) == (declared == SiteKind.EXTERNAL),
    )
    groups = table.groupby("subject")
    return groups.agg(
        splits=("split", "nunique"), sites=("site", "nunique"), sexes=("sex", "nunique"),
        kind_holds=("kind_holds", "all"), side_holds=("side_holds", "all"),
    ).reset_index(drop=True)  # fmt: skip


def _list_strata(manifest: Any, pixels: Any, question: Question) -> Any:
    """One row a split and site: how many subjects, and how many classes (in validation: of all sites)."""
    seen = pixels["mask_classes"].to_numpy()
    if question.section.kind is Kind.CLASSIFICATION:
        seen = [1 << int(label) if label in (0, 1) else 0 for label in manifest["label"]]
    groups = manifest.assign(seen=seen).groupby(["split", "site"])
    strata = groups.agg(subjects=("subject", "nunique"), seen=("seen", np.bitwise_or.reduce))
    pooled = strata.index.get_level_values("split") == Split.VALIDATION  # one operating point for all sites
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
        expectation = getattr(gx.expectations, rule.kind)(description=rule.sentence, **rule.options)
        suite.add_expectation(expectation)
    definition = gx.ValidationDefinition(name=name, data=batch, suite=suite)
    checkpoint = gx.Checkpoint(
        name=name,
        validation_definitions=[context.validation_definitions.add(definition)],
        result_format={"result_format": "SUMMARY", "partial_unexpected_count": 0},  # no values of a row
    )
    outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame})
    (validation,) = outcome.run_results.values()
    return [_summarise(name, result) for result in validation.results]


def _summarise(table: str, result: Any) -> dict[str, Any]:
    """One expectation's outcome for expectations.json."""
    return {
        "table": table,
        "expectation": result.expectation_config.description,
        "column": result.expectation_config.kwargs.get("column"),
        "success": bool(result.success),
        "observed": {key: result.result[key] for key in SUMMARY if key in result.result},
    }
