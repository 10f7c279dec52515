"""Surface distances agree with MONAI's, in the plane and in the volume."""

import numpy as np
import pytest
import torch

from imaging.scores import surface_distances


@pytest.mark.parametrize(("shape", "spacing"), [((40, 48), (1.5, 2.0)), ((12, 24, 20), (3.0, 1.0, 1.2))])
def test_surface_distances_are_monais(shape, spacing):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    rng = np.random.default_rng(0)
    grid = np.moveaxis(np.indices(shape), 0, -1)
    for _ in range(5):
        centres = [np.array(shape) / 2 + rng.uniform(-2, 2, len(shape)) for _ in range(2)]
        truth, answer = (
            np.linalg.norm(grid - centre, axis=-1) + rng.normal(0, 0.7, shape) < min(shape) / 3
            for centre in centres
        )
        given = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (answer, truth)]
        mean = compute_average_surface_distance(
            *given, include_background=True, symmetric=True, spacing=spacing
        )
        worst = compute_hausdorff_distance(*given, include_background=True, percentile=95, spacing=spacing)
        assert surface_distances(truth, answer, spacing) == pytest.approx(
            (float(mean), float(worst)), rel=1e-5
        )
