"""An answer comes as the caller asks for it, and can be given again, bit for bit."""

import base64
import hashlib
import io
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from imaging.errors import DataError, Unreadable
from imaging.vocabulary import Modality
from monitoring.journal import open_journal
from services.findings import encode
from services.offline import replay
from tests.tiny_gateway import NPY, draw_pixels

NIFTI = "application/x-nifti"


def read_png(body):
    return np.asarray(Image.open(io.BytesIO(body)))


@pytest.fixture(scope="module")
def mask(gateway):
    told = gateway.post(task="discs").json()["mask"]
    assert told["labels"] == {"0": "background", "1": "disc", "2": "rim"}
    return read_png(base64.b64decode(told["data"]))


def test_a_mask_is_a_png_when_a_png_is_accepted(gateway, mask):
    told = gateway.post(task="discs", Accept="image/png")
    assert told.headers["content-type"] == "image/png"
    assert np.array_equal(read_png(told.content), mask)
    answer = json.loads(told.headers["x-answer"])
    assert answer["area_px"]["disc"] == int((mask == 1).sum())
    assert open_journal(gateway.places.var).find(answer["id"])["task"] == "discs"


def test_a_mask_is_a_nifti_that_lies_like_the_image(gateway, mask):
    body = encode(draw_pixels(), NIFTI, 2.0, Modality.CT)
    told = gateway.post(task="discs", body=body, kind=NIFTI, Accept=NIFTI)
    answered, sent = nib.Nifti1Image.from_bytes(told.content), nib.Nifti1Image.from_bytes(body)
    assert nib.aff2axcodes(answered.affine) == nib.aff2axcodes(sent.affine)
    assert answered.header.get_zooms()[:2] == (2.0, 2.0)
    turned = np.asarray(answered.dataobj)[::-1, ::-1].T.squeeze()
    assert np.array_equal(turned, mask)


def test_a_mask_is_runs_when_runs_are_accepted(gateway, mask):
    told = gateway.post(task="discs", Accept="application/json; mask=rle").json()["mask"]
    assert told["encoding"] == "rle"
    flat = np.concatenate([np.full(count, label) for label, count in told["runs"]])
    assert np.array_equal(flat.reshape(told["shape"]), mask)


@pytest.mark.parametrize(("task", "accept"), [("discs", "text/html"), ("nodes", "image/png")])
def test_a_form_that_there_is_not_is_refused(gateway, task, accept):
    told = gateway.post(task=task, Accept=accept)
    assert (told.status_code, told.json()["type"]) == (406, "/problems/not-acceptable")


def test_the_stages_are_told_and_counted(gateway):
    before = gateway.count("formulary_stage_seconds_count", task="nodes", stage="engine")
    told = gateway.post().headers["server-timing"]
    assert [part.split(";")[0] for part in told.split(", ")] == [
        "read",
        "decode",
        "engine",
        "findings",
        "journal",
    ]
    assert gateway.count("formulary_stage_seconds_count", task="nodes", stage="engine") == before + 1


@pytest.mark.parametrize("task", ["discs", "nodes"])
def test_a_prediction_is_given_again_bit_for_bit_whatever_stood_beside_it(gateway, tmp_path, task):
    bodies = [encode(draw_pixels(seed), NPY, 2.0, Modality.CT) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        gateway.signal(signal.SIGSTOP)  # what comes meanwhile is there at once, and shares batches
        waiting = [pool.submit(gateway.post, task=task, body=body) for body in bodies]
        time.sleep(0.5)
        gateway.signal(signal.SIGCONT)
        told = [one.result().json() for one in waiting]
    batches = []
    for answer, body in zip(told, bodies, strict=True):
        (path := tmp_path / "image.npy").write_bytes(body)
        again = replay(gateway.places, answer["id"], path)
        assert again["equal"], again
        assert again["answer"].items() <= answer.items()
        batches.append(again["batch"])
    assert any(not batch.endswith(":1") for batch in batches)


def test_replay_says_when_the_file_is_another_one(gateway, tmp_path):
    answer = gateway.post().json()
    (path := tmp_path / "image.npy").write_bytes(encode(draw_pixels(9), NPY, 2.0, Modality.CT))
    with pytest.raises(Unreadable, match="not the file"):
        replay(gateway.places, answer["id"], path)
    with pytest.raises(Unreadable, match="no prediction"):
        replay(gateway.places, "nothing", path)


def test_replay_is_a_command_that_fails_when_bits_differ(gateway, tmp_path):
    body = encode(draw_pixels(), NPY, 2.0, Modality.CT)
    answer = gateway.post(body=body).json()
    (path := tmp_path / "image.npy").write_bytes(body)
    row = open_journal(gateway.places.var).find(answer["id"])
    assert row["image"] == hashlib.sha256(body).hexdigest()
    command = [sys.executable, "-m", "formulary", "services", "replay", answer["id"], str(path)]
    told = subprocess.run(
        command, cwd=gateway.places.root, env=gateway.environment, capture_output=True, text=True
    )
    assert (told.returncode, "bit for bit" in told.stdout) == (0, True), told.stderr


def test_a_row_older_than_replays_cannot_be_given_again(gateway, tmp_path, monkeypatch):
    monkeypatch.setattr("monitoring.journal.Journal.find", lambda *_: {"batch": "", "image": ""})
    with pytest.raises(DataError, match="before replays"):
        replay(gateway.places, "x", tmp_path / "image.npy")
