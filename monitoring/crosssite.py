"""The cross-site card of a version: site by site, the worst, each left out, and what the next may bring.

It is computed from the sums that sites export (`monitoring.sums`), and equals what their rows together would
give, where no sum was withheld.
"""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from imaging.errors import DataError
from monitoring.sums import BINS, FEW_ERRORS, FEW_RIGHT, MEANS, SHARES, Bin, Moments, Statistics

TEMPLATE = Path(__file__).parent / "templates" / "crosssite.html"
ENOUGH_SITES = 10  # fewer: the interval for the next site is indicative
LEAST_SITES = 3  # a prediction interval has two degrees of freedom less than there are sites
CONFIDENCE = 0.95
MOST_ABSENT = 0.2  # of sites or of cases: more that withhold a metric for how they are answered bias it
BIASED = {FEW_ERRORS: "worse", FEW_RIGHT: "better"}  # how the others then look
PASSED_ON = "So do all as one, each left out and the next site."
SAME = ("task", "version", "package", "source")
FIX = "Ask every site to export the same version: `formulary monitoring export-statistics`."


def build_card(told: list[Statistics]) -> dict[str, Any]:
    """The card as JSON.

    Args:
        told: of each site.

    Returns:
        task, version, package, source, simulated, threshold (None where sites differ); `sites`, `pooled` and
        `left_out` (site -> all others): metric -> {estimate, low, high, subjects, cases, sites, exact}, and
        bins, of a site its line; `worst`: metric -> the site furthest below the pooled value, and how far;
        `next_site`: metric -> mean, spread and prediction interval; `absent`: as `find_absent`; `missing`:
        what was withheld or rounded.

    Raises:
        DataError: there is none, two are of one site, or they are not of one package, version and source.
    """
    _agree(told)
    by_site = {one.site: one for one in sorted(told, key=lambda one: one.site)}
    thresholds = {one.threshold for one in told}
    sites = {site: _describe_site(one) for site, one in by_site.items()}
    pooled, absent = _pool(list(by_site.values())), find_absent(list(by_site.values()))
    first = told[0]
    return {
        **{name: getattr(first, name) for name in SAME},
        "simulated": first.simulated,
        "confidence": CONFIDENCE,
        "threshold": first.threshold if len(thresholds) == 1 else None,
        "sites": sites,
        "pooled": pooled,
        "left_out": {site: _pool([one for name, one in by_site.items() if name != site]) for site in by_site}
        if len(by_site) > 1 else {},
        "worst": {name: _find_worst(name, sites, pooled) for name in SHARES
                  if sum(name in told for told in sites.values()) > 1},
        "next_site": {name: foresee([one for site in sites.values() if (one := site.get(name))])
                      if name in pooled else None for name in SHARES},
        "absent": absent,
        "missing": [*(one["sentence"] for one in absent.values()),
                    *chain(*map(_tell_missing, by_site.values()))],
    }  # fmt: skip


def find_absent(told: list[Statistics]) -> dict[str, Any]:
    """Metrics that sites withhold for few errors or few right answers: the others are a biased choice.

    Args:
        told: of each site.

    Returns:
        Share or bins -> sites, cases of both classes, too_many (so nothing is pooled or foreseen), sentence.
    """
    found = {}
    for name in (*SHARES, "bins"):
        if not (absent := [one for one in told if one.withheld.get(name) in BIASED]):
            continue
        every = [*absent, *(one for one in told if getattr(one, name))]
        cases, of = (sum(one.count_cases() for one in some) for some in (absent, every))
        too_many = len(absent) > MOST_ABSENT * len(every) or cases > MOST_ABSENT * of
        causes = {why: BIASED[why] for why in sorted({one.withheld[name] for one in absent})}
        sentence = (
            f"{name.capitalize()}: {len(absent)} of {len(every)} sites ({cases} of {of} cases) are left out "
            f"for {' or '.join(causes)}; the others look {' or '.join(causes.values())} than all would. "
            + ("More than a fifth: nothing is pooled or foreseen." if too_many else PASSED_ON)
        )
        found[name] = {"sites": [one.site for one in absent], "cases": cases, "too_many": too_many,
                       "sentence": sentence}  # fmt: skip
    return found


def measure_share(parts: list[Moments]) -> dict[str, Any]:
    """Wilson interval of a share, its counts divided by the design effect, as `imaging.intervals.wilson`."""
    from statsmodels.stats.proportion import proportion_confint

    share, spread, told = _average(parts)
    cases = told["cases"]
    even = share * (1 - share) / (cases - 1)
    effect = max(1.0, spread / even) if even else cases / told["subjects"]
    low, high = proportion_confint(share * cases / effect, cases / effect, 1 - CONFIDENCE, method="wilson")
    return {"estimate": share, "low": min(float(low), share), "high": max(float(high), share), **told,
            "effect": effect}  # fmt: skip


def measure_mean(parts: list[Moments]) -> dict[str, Any]:
    """Mean over images with an interval by subject (ratio estimator, normal law)."""
    middle, spread, told = _average(parts)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * spread**0.5
    return {"estimate": middle, "low": middle - half, "high": middle + half, **told}


def foresee(sites: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Random effects over sites on the logit scale: their mean, and what the next site may have.

    Args:
        sites: estimate and design effect of each, as `measure_share` tells them.

    Returns:
        Shares: mean [estimate, low, high], next [low, high], tau (sd between sites, in logits), sites, and
        whether they are so few that it is indicative; None under three sites.
    """
    shares = np.array([one["estimate"] for one in sites])
    kept = (shares > 0) & (shares < 1)
    if kept.sum() < LEAST_SITES:
        return None
    weights = np.array([one["cases"] / one["effect"] for one in sites])[kept]
    shares = shares[kept]
    found = combine(np.log(shares / (1 - shares)), 1 / (weights * shares * (1 - shares)))
    mean, following = ([1 / (1 + np.exp(-value)) for value in found[name]] for name in ("mean", "next"))
    return {"mean": mean, "next": following, "tau": found["tau2"] ** 0.5, "sites": int(kept.sum()),
            "indicative": bool(kept.sum() < ENOUGH_SITES)}  # fmt: skip


def combine(effects: Any, variances: Any) -> dict[str, Any]:
    """DerSimonian and Laird with Hartung and Knapp, and a prediction interval with t of two degrees less.

    Where effects agree, Hartung and Knapp's variance can be less than sampling alone gives: the wider counts.

    Args:
        effects: of each study, on a scale where they are normal, shape (k,), k at least 3.
        variances: of each, shape (k,).

    Returns:
        tau2, mean [estimate, low, high], next [low, high].
    """
    from scipy.stats import t
    from statsmodels.stats.meta_analysis import combine_effects

    with np.errstate(all="ignore"):  # it does not cut tau2 at 0, so weights of random effects may be negative
        found = combine_effects(effects, variances, method_re="chi2", use_t=True)
    kind, between = ("re", float(found.tau2)) if found.tau2 > 0 else ("fe", 0.0)
    middle = float(getattr(found, f"mean_effect_{kind}"))
    spread = max(float(getattr(found, f"{name}_{kind}")) for name in ("var_hksj", "var_eff_w"))
    near, far = (float(t.ppf((1 + CONFIDENCE) / 2, len(effects) - less) * variance**0.5)
                 for less, variance in ((1, spread), (2, between + spread)))  # fmt: skip
    return {"tau2": between, "mean": [middle, middle - near, middle + near],
            "next": [middle - far, middle + far]}  # fmt: skip


def render_card(card: dict[str, Any]) -> str:
    """The card as one page that needs no network."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(card=card, shares=SHARES, means=MEANS, enough=ENOUGH_SITES)


def _agree(told: list[Statistics]) -> None:
    if not told:
        raise DataError("There are no statistics.", FIX)
    for name in SAME:
        found = sorted({str(getattr(one, name)) for one in told})
        if len(found) > 1:
            raise DataError(f"The files are of more than one {name}: {', '.join(found)}.", FIX)
    sites = [one.site for one in told]
    if twice := sorted({site for site in sites if sites.count(site) > 1}):
        raise DataError(f"More than one file is of {', '.join(twice)}.", "Give one file a site.")


def _tell_missing(told: Statistics) -> list[str]:
    rounded = [name for name in (*SHARES, *MEANS) if (one := getattr(told, name)) and one.rounded is not None]
    wide = [one for one in told.bins or () if one.high - one.low > 1 / BINS + 1e-9]
    sentences = {
        f"withheld {', '.join(f'{name} ({why})' for name, why in told.withheld.items())}": told.withheld,
        f"rounded the sums of squares of {', '.join(rounded)}: its interval is wider": rounded,
        "joined tenths of the probability that have fewer than ten of a class": wide,
    }
    return [f"{told.site} {sentence}." for sentence, cause in sentences.items() if cause]


def _describe_site(told: Statistics) -> dict[str, Any]:
    bins = [_show_bin(one) for one in told.bins] if told.bins else None
    line = told.line.model_dump() if told.line else None
    return {**_measure([told]), "threshold": told.threshold, "bins": bins, "line": line}


def _measure(told: list[Statistics]) -> dict[str, Any]:
    """Every metric over the sites that did not withhold it."""
    found: dict[str, Any] = {}
    for name in (*SHARES, *MEANS):
        parts = {one.site: part for one in told if (part := getattr(one, name))}
        if parts:
            measure = measure_share if name in SHARES else measure_mean
            found[name] = measure(list(parts.values())) | ({"sites": list(parts)} if len(told) > 1 else {})
    return found


def _pool(told: list[Statistics]) -> dict[str, Any]:
    """All sites as one, but for what too many withhold; subjects of two sites are two subjects."""
    bins, absent = _pool_bins([one.bins for one in told if one.bins]), find_absent(told)
    found = {**_measure(told), "bins": [_show_bin(one) for one in bins]}
    return {name: one for name, one in found.items() if name not in absent or not absent[name]["too_many"]}


def _pool_bins(tables: list[tuple[Bin, ...]]) -> list[Bin]:
    """The bins of all sites between the edges that they share."""
    if not tables:
        return []
    shared = set.intersection(*({0.0, *(one.high for one in table)} for table in tables))
    every = [one for table in tables for one in table]
    found = []
    for low, high in pairwise(sorted(shared)):
        inside = [one for one in every if low <= one.low and one.high <= high]
        sums = {name: sum(getattr(one, name) for one in inside) for name in ("count", "said", "positives")}
        found.append(Bin(low=low, high=high, **sums))
    return found


def _show_bin(one: Bin) -> dict[str, Any]:
    mean = {"said": one.said / one.count, "share": one.positives / one.count}
    return {"low": one.low, "high": one.high, **mean, "count": one.count}


def _find_worst(name: str, sites: dict[str, Any], pooled: dict[str, Any]) -> dict[str, Any]:
    there = {site: told[name]["estimate"] for site, told in sites.items() if name in told}
    worst, best = min(there, key=lambda one: there[one]), max(there, key=lambda one: there[one])
    below = pooled[name]["estimate"] - there[worst] if name in pooled else None
    return {"site": worst, "estimate": there[worst], "below_pooled": below,
            "best": best, "below_best": there[best] - there[worst]}  # fmt: skip


def _average(parts: list[Moments]) -> tuple[float, float, dict[str, Any]]:
    """Ratio of sums, its variance by subject, and what it rests on."""
    cases, subjects = sum(one.cases for one in parts), sum(one.subjects for one in parts)
    middle = sum(one.hits for one in parts) / cases
    spread = subjects / (subjects - 1) * sum(one.scatter(middle) for one in parts) / cases**2
    exact = all(one.rounded is None for one in parts)
    return middle, spread, {"subjects": subjects, "cases": cases, "exact": exact}
