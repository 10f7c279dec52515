"""What jobs compute, held against MONAI's sliding window and a network whose reason is known."""

import io
import json

import numpy as np
import pytest
from PIL import Image as Pillow

from imaging.preparation import prepare
from imaging.vocabulary import JobKind, Kind, Method, Modality
from registry.engines import open_engine
from registry.graphs import export_graphs
from services.explanations import explain
from services.findings import encode
from services.jobs import Job
from services.products import Opened, make
from services.volumes import segment
from tests.tiny import promise

NPY = "application/x-npy"
CONTRACT = promise(Kind.CLASSIFICATION, ("none", "disc"), max_batch=16)
CORNER = (slice(4, 8), slice(20, 26))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A package's graphs of a network that reads the mean of one corner and nothing else."""
    import torch

    class Corner(torch.nn.Module):
        def forward(self, image):
            score = 4 * image[:, 0, CORNER[0], CORNER[1]].mean((1, 2))
            return torch.stack([-score, score], 1), image[:, 0], image.mean((2, 3))

    folder = tmp_path_factory.mktemp("package")
    export_graphs(Corner().eval(), CONTRACT, folder)
    return folder


def answer(images):
    score = 4 * images[:, 0, CORNER[0], CORNER[1]].mean(axis=(1, 2))
    return np.stack([-score, score], axis=1)


def drive(work, answer):
    """What a job makes of logits, and how often it asked for some."""
    step, calls = next(work), 0
    while True:
        calls += 1
        try:
            step = work.send(answer(step.images) if len(step.images) else np.zeros(0, np.float32))
        except StopIteration as done:
            return done.value, calls


@pytest.mark.parametrize("method", list(Method))
def test_the_heat_lies_where_the_network_looks(method, folder):
    image = np.full((1, 32, 32), -0.5, np.float32)
    image[(0, *CORNER)] = 0.4
    heat, calls = drive(explain(method, image, CONTRACT, folder), answer)
    assert heat.shape == (32, 32)
    assert heat.min() >= 0
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert 2 <= row <= 9
    assert 18 <= column <= 27
    assert heat[16:].max() < 1e-6
    assert calls > 5  # so that it can be cancelled in between


def test_a_gradient_is_that_of_the_log_odds(folder):
    image = np.zeros((1, 32, 32), np.float32)
    heat, _ = drive(explain(Method.GRADIENT, image, CONTRACT, folder), answer)
    inside = 2 * 4 / (4 * 6)  # the log odds are twice the score, a mean of 24 pixels
    assert heat[CORNER] == pytest.approx(inside, rel=1e-4)
    assert (heat > 0).sum() == 24


@pytest.mark.parametrize("method", list(Method))
def test_a_heat_map_that_passed_its_audit_is_a_picture_and_an_array(method, folder, tmp_path):
    pixels = np.full((32, 32), -700, np.int16)
    pixels[CORNER] = 0
    (tmp_path / "body").write_bytes(encode(pixels, NPY, 1.0, Modality.CT))
    job = Job(id="1", kind=JobKind.EXPLANATION, task="t", site="north", request_id="r", form=NPY, image="",
              method=method, subject=None, created="")  # fmt: skip
    engine = open_engine(folder, "openvino", "f32")
    opened = Opened(1, "", folder, CONTRACT, engine, "")
    made, _ = drive(make(job, tmp_path / "body", opened), lambda images: engine.run(images).logits)
    heat = np.load(io.BytesIO(made.files["heat.npy"]))
    picture = np.asarray(Pillow.open(io.BytesIO(made.files["heat.png"])))
    told = json.loads(made.files["heat.json"])
    assert np.array_equal(picture, np.rint(255 * heat / heat.max()))
    assert (told["method"], told["heat"]["encoding"]) == (method, "image/png;base64")
    assert told["peak"] == pytest.approx(float(heat.max()))


DEEP = promise(Kind.SEGMENTATION, ("background", "dark", "bright"), depth=8, rows=16, columns=12, max_batch=4)


def think(windows):
    """A network that sees more than a voxel, so that windows disagree where they overlap."""
    middle = windows.mean(axis=tuple(range(2, windows.ndim)), keepdims=True)
    return np.concatenate([0.1 - windows**2, windows - middle, middle - windows * 0.9], axis=1)


@pytest.mark.parametrize("shape", [(8, 16, 12), (20, 40, 30), (9, 17, 33)])
def test_a_volume_without_air_is_labelled_as_monai_labels_it(shape):
    import torch
    from monai.inferers import sliding_window_inference

    pixels = np.random.default_rng(0).uniform(-700, -100, shape).astype(np.float32)
    image = torch.from_numpy(prepare(pixels, DEEP.preparation))[None]
    expected = sliding_window_inference(
        image,
        DEEP.spatial,
        1,
        lambda part: torch.from_numpy(think(part.numpy())),
        overlap=0.25,
        mode="gaussian",
    )
    labels, _ = drive(segment(pixels, DEEP), think)
    assert (labels == expected.argmax(1)[0].numpy()).mean() > 0.9999  # sums in another order
