"""T1 MR volumes of the brain, coarse and small: the 3D variant of brain_tissue, from the same template.

What is real and what is simulated is as there: one average anatomy, deformed for each virtual subject.
"""

from __future__ import annotations

import numpy as np

from training.cohorts import brain_tissue
from training.cohorts.brain_tissue import Acquisition, acquire, deform, draw_tissue
from training.cohorts.cases import Case, acquired_on, between, draw_person, stream

STREAM = "brain-volume"
SHAPE = (16, 56, 48)
SPACING_MM = 4.0
LICENCE, SOURCE = brain_tissue.LICENCE, brain_tissue.SOURCE
SIMULATED, LIMITS = brain_tissue.SIMULATED, brain_tissue.LIMITS
SITES, CHANGED_SITE = brain_tissue.SITES, brain_tissue.CHANGED_SITE
CHANGED_SCANNER = brain_tissue.CHANGED_SCANNER

MIDDLE_MM = (6.0, 18.0)  # level of the volume's middle, in template coordinates
SMOOTH_MM = 1.4  # of the template, so that a voxel is about the average of what it covers


def make_case(seed: int, site: str, subject: int, view: int, profile: Acquisition | None = None) -> Case:
    """One volume of one virtual subject.

    Args:
        seed: of the cohort.
        site: one of SITES.
        subject: number of the subject at its site.
        view: number of the volume; later ones are of the same anatomy.
        profile: another acquisition than the site's own.

    Returns:
        uint16 voxels (16, 56, 48) at 4 mm along every axis, slices from the feet up, and the mask of tissue
        classes 0 to 3.
    """
    profile = profile or SITES[site]
    body, rng = stream(seed, STREAM, site, subject), stream(seed, STREAM, site, subject, view)
    person = draw_person(body, profile.mean_age)
    levels = between(rng, MIDDLE_MM) + (np.arange(SHAPE[0]) - (SHAPE[0] - 1) / 2) * SPACING_MM
    tissue, mask = draw_tissue(deform(body, levels, SHAPE[1:], SPACING_MM), body, SMOOTH_MM)
    stored = acquire(tissue, profile, rng)
    return Case(stored, mask, None, person, acquired_on(person, view), profile.scanner, SPACING_MM)
