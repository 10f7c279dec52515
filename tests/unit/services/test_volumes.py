"""Windows over a volume: nothing outside the body, batches, bounded memory."""

import numpy as np
import pytest

from imaging.errors import WrongShape
from imaging.preparation import prepare
from imaging.vocabulary import Kind
from services import volumes
from tests.tiny import promise

CLASSES = ("background", "dark", "bright")
DEEP = promise(Kind.SEGMENTATION, CLASSES, depth=8, rows=16, columns=12, max_batch=4)
FLAT = promise(Kind.SEGMENTATION, CLASSES, rows=40, columns=30, max_batch=4)


def think(windows):
    """A network that sees more than a voxel, so that windows disagree where they overlap."""
    middle = windows.mean(axis=tuple(range(2, windows.ndim)), keepdims=True)
    return np.concatenate([0.1 - windows**2, windows - middle, middle - windows * 0.9], axis=1)


def run(pixels, contract, seen=None):
    work = volumes.segment(pixels.astype(np.float32), contract)
    step = next(work)
    while True:
        if seen is not None:
            seen.append(len(step.images))
        try:
            step = work.send(think(step.images))
        except StopIteration as done:
            return done.value


def draw_noise(shape, seed=0):
    """Tissue everywhere: no air to leave out."""
    return np.random.default_rng(seed).uniform(-700, -100, shape)


def draw_ball(shape, radius):
    """Tissue in the middle of air."""
    grid = np.indices(shape)
    away = sum((axis - side / 2) ** 2 for axis, side in zip(grid, shape, strict=True))
    return np.where(away < radius**2, 0.0, -1000.0) + np.random.default_rng(1).normal(0, 10, shape)


def test_slices_are_prepared_and_labelled_one_by_one():
    pixels = draw_noise((5, 40, 30)).astype(np.float32)
    expected = [think(prepare(plane, FLAT.preparation)[None])[0].argmax(axis=0) for plane in pixels]
    assert np.array_equal(run(pixels, FLAT), np.stack(expected))


def test_windows_are_where_the_body_is_and_air_is_the_first_class():
    pixels = draw_ball((40, 64, 60), 12)
    body = volumes.find_body(pixels.astype(np.float32))
    assert body[pixels > -500].all()
    assert body.mean() < 0.3
    seen, everywhere = [], []
    labels = run(pixels, DEEP, seen)
    run(draw_noise(pixels.shape), DEEP, everywhere)
    assert sum(seen) < sum(everywhere) / 3
    assert set(np.unique(labels[~body])) <= {0, 1, 2}
    assert not labels[0].any()
    assert not labels[:, 0].any()
    assert labels[20, 32, 30]


def test_an_empty_place_between_two_parts_of_a_body_is_skipped():
    pixels = np.full((60, 32, 24), -1000.0)
    pixels[2:8, 8:24, 6:18] = pixels[52:58, 8:24, 6:18] = 0
    labels = run(pixels, DEEP)
    assert labels[4, 16, 12]
    assert labels[55, 16, 12]
    assert not labels[30].any()


def test_windows_go_to_the_engine_in_batches():
    seen = []
    run(draw_noise((20, 40, 30)), DEEP, seen)
    assert max(seen) == DEEP.max_batch
    assert min(seen[:-1]) >= 2


@pytest.mark.parametrize(
    ("shape", "contract"),
    [((7, 16, 12), DEEP), ((8, 16, 11), DEEP), ((16, 12), DEEP), ((5, 40, 31), FLAT),
     ((8, 16, 12), promise(Kind.CLASSIFICATION, depth=8, rows=16, columns=12)),
     ((8, 16, 12), promise(Kind.SEGMENTATION, CLASSES, channels=3, rows=16, columns=12))],
)  # fmt: skip
def test_a_volume_that_windows_cannot_cover_is_refused(shape, contract):
    with pytest.raises(WrongShape):
        volumes.check_volume(shape, contract)


def test_memory_stays_within_what_is_promised():
    import tracemalloc

    pixels = draw_noise((96, 96, 96)).astype(np.float32)
    tracemalloc.start()
    run(pixels, DEEP)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    slab = 4 * len(CLASSES) * DEEP.depth * 96 * 96
    assert peak < 28 * pixels.size + 4 * slab
