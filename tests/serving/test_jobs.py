"""Jobs: volumes and explanations through a running gateway and its worker, whatever happens to either."""

import gzip
import io
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace

import nibabel as nib
import numpy as np
import psutil
import pytest

from imaging.config import Places
from imaging.vocabulary import ContentType, JobKind
from monitoring.journal import open_journal
from services.job_worker import JobWorker
from services.jobs import Job, JobStore
from tests.tiny import SIZE
from tests.tiny_gateway import NPY, Gateway, draw_pixels

NORTH = {"X-Site": "north"}
SPACING_MM = 2.0


def draw_volume(depth=6):
    """Slices of tissue as the tiny tasks know it, int16 (depth, rows, columns)."""
    return np.stack([draw_pixels(number) for number in range(depth)])


def as_npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def as_nifti(volume, affine):
    """A NIfTI whose axes run left, to posterior and up: as `decode` returns it, transposed."""
    return nib.Nifti1Image(volume.T, affine).to_bytes()


def ask(gateway, body, kind=NPY, task="discs", path="volumes", **headers):
    headers = {"Content-Type": kind, "X-Site": "north", **headers}
    return gateway.client.post(f"/v1/models/{task}/{path}", content=body, headers=headers)


def wait(gateway, place, seconds=90, states=("done", "failed", "cancelled")):
    """The status of a job once it is finished."""
    deadline = time.monotonic() + seconds
    while True:
        told = gateway.client.get(place, headers=NORTH).json()
        if told.get("state") in states:
            return told
        assert time.monotonic() < deadline, f"{told}\n{gateway.log.read_text()[-3000:]}"
        time.sleep(0.1)


def fetch(gateway, place, accept="*/*"):
    return gateway.client.get(f"{place}/result", headers={**NORTH, "Accept": accept})


def rows_of(places, number):
    return [row for row in open_journal(places.var).newest(None, None, 10_000) if row["id"] == number]


def worker_of(gateway):
    children = psutil.Process(gateway.process.pid).children(recursive=True)
    return next((child for child in children if "services.job_worker" in child.cmdline()), None)


def test_a_volume_is_labelled_slice_by_slice_as_predict_labels_it(gateway, places):
    volume = draw_volume()
    taken = ask(gateway, as_npy(volume), **{"X-Request-ID": "volume-1"})
    assert taken.status_code == 202, taken.text
    place = taken.headers["location"]
    told = wait(gateway, place)
    assert told["state"] == "done", told
    assert (told["task"], told["version"], told["progress"]) == ("discs", 1, 1.0)
    labels = np.load(io.BytesIO(fetch(gateway, place, NPY).content))
    for plane, pixels in zip(labels, volume, strict=True):
        answer = gateway.post("discs", as_npy(pixels), Accept="application/x-nifti").content
        mask = np.asarray(nib.Nifti1Image.from_bytes(answer).dataobj)[::-1, ::-1].T
        assert np.array_equal(plane, mask.reshape(plane.shape))
    assert told["voxels"] == dict(
        zip(("background", "disc", "rim"), np.bincount(labels.ravel(), minlength=3).tolist(), strict=True)
    )
    (row,) = rows_of(places, told["id"])
    assert (row["task"], row["request_id"], row["site"]) == ("discs/volumes", "volume-1", "north")


def test_a_mask_lies_as_its_nifti_lay_and_has_its_volume_in_millilitres(gateway):
    volume, affine = draw_volume(), np.diag([-SPACING_MM, -SPACING_MM, 5.0, 1])
    affine[:3, 3] = 10, 20, -30
    flipped = np.diag([SPACING_MM, SPACING_MM, 5.0, 1])
    masks = {}
    for name, (body, how) in {
        "plain": (as_nifti(volume, affine), affine),
        "gzipped": (gzip.compress(as_nifti(volume, affine)), affine),
        "turned": (as_nifti(volume[:, ::-1, ::-1], flipped), flipped),
    }.items():
        place = ask(gateway, body, ContentType.NIFTI).headers["location"]
        told = wait(gateway, place)
        response = fetch(gateway, place)
        assert response.headers["content-type"] == "application/x-nifti"
        made = nib.Nifti1Image.from_bytes(gzip.decompress(response.content))
        assert np.allclose(made.affine, how)
        assert made.get_data_dtype() == np.uint8
        masks[name] = np.asarray(made.dataobj).T
        disc = told["voxels"]["disc"]
        assert told["volume_ml"]["disc"] == pytest.approx(disc * SPACING_MM**2 * 5 / 1000, abs=1e-3)
        assert disc == (masks[name] == 1).sum()
    assert np.array_equal(masks["plain"], masks["gzipped"])
    assert np.array_equal(masks["plain"], masks["turned"][:, ::-1, ::-1])


def test_a_mask_can_be_had_as_runs(gateway):
    place = ask(gateway, as_npy(draw_volume())).headers["location"]
    wait(gateway, place)
    told = fetch(gateway, place, "application/json").json()
    labels = np.load(io.BytesIO(fetch(gateway, place, NPY).content))
    values, lengths = np.array(told["runs"]).T
    assert np.array_equal(np.repeat(values, lengths).reshape(told["shape"]), labels)
    assert fetch(gateway, place, "text/html").status_code == 406
    assert fetch(gateway, place, "text/html, */*;q=.5").status_code == 200


REFUSED = [
    ("a picture", {"kind": "image/png"}, 415, "wrong-type"),
    ("no site", {"X-Site": ""}, 400, "site-required"),
    ("other slices", {"body": as_npy(np.zeros((3, SIZE, SIZE + 1), np.int16))}, 422, "wrong-shape"),
    ("a plane", {"body": as_npy(np.zeros((SIZE, SIZE), np.int16))}, 422, "wrong-shape"),
    ("noise", {"body": b"\0" * 200}, 400, "unreadable"),
    ("too many voxels", {"body": as_npy(np.zeros((1, 2), np.int16)).replace(b"(1, 2)", b"(9999, 32, 999)")},
     413, "too-large"),
    ("a task that classifies", {"task": "nodes"}, 422, "wrong-shape"),
    ("an unknown task", {"task": "nobody"}, 404, "unknown-task"),
    ("a query", {"path": "volumes?url=http://127.0.0.1"}, 400, "unreadable"),
    ("an unknown method", {"task": "nodes", "path": "explanations?method=lime"}, 400, "unreadable"),
    ("no image", {"task": "nodes", "path": "explanations", "body": b"x"}, 400, "unreadable"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "asked", "status", "problem"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_become_a_job_is_refused_at_once(gateway, places, what, asked, status, problem):
    asked = {"body": as_npy(draw_volume()), **asked}
    response = ask(gateway, asked.pop("body"), **asked)
    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{problem}")
    assert not list((places.var / "jobs").glob("*.draft"))


def test_a_job_that_fails_says_why(gateway, places):
    volume = draw_volume().astype(np.float32)
    volume[3, 4, 5] = np.nan
    place = ask(gateway, as_npy(volume)).headers["location"]
    told = wait(gateway, place)
    assert (told["state"], told["problem"]["type"]) == ("failed", "/problems/not-finite")
    assert fetch(gateway, place).status_code == 409
    assert not rows_of(places, told["id"])
    assert not list((places.var / "jobs").glob("*/body")) or told["state"] == "failed"


def test_a_job_is_nobody_elses(gateway):
    place = ask(gateway, as_npy(draw_volume())).headers["location"]
    wait(gateway, place)
    for path in (place, f"{place}/result", "/v1/jobs/none", "/v1/jobs/..%2f..", place[:-1] + "g"):
        assert gateway.client.get(path, headers={"X-Site": "east"}).status_code == 404
    assert gateway.client.delete(place, headers={"X-Site": "east"}).status_code == 404
    assert gateway.client.get(place).json()["type"] == "/problems/site-required"
    assert fetch(gateway, place).status_code == 200
    assert gateway.client.delete(place, headers=NORTH).status_code == 202
    assert gateway.client.get(place, headers=NORTH).status_code == 404


def test_a_heat_map_that_was_not_audited_is_withheld_in_the_words_of_predict(gateway):
    body = as_npy(draw_pixels())
    headers = {"Content-Type": NPY, **NORTH}
    predicted = gateway.client.post("/v1/models/nodes/predict?heat=1", content=body, headers=headers)
    withheld = predicted.json()["heat_withheld"]
    place = ask(gateway, body, task="nodes", path="explanations?method=occlusion").headers["location"]
    told = wait(gateway, place)
    assert (told["state"], told["heat_withheld"]) == ("done", withheld)
    result = fetch(gateway, place).json()
    assert (result["heat"], result["heat_withheld"]) == (None, withheld)
    assert fetch(gateway, place, "image/png").json()["heat"] is None


def copy_places(places, folder):
    """The same checkout elsewhere: gateways that share one take up each other's jobs."""
    shutil.copytree(places.root, folder, ignore=shutil.ignore_patterns("jobs", "*.log"))
    return Places(root=folder, build=folder / "build", var=folder / "var")


@pytest.fixture(scope="module")
def own(places, tmp_path_factory):
    """A gateway of these tests alone, so that its worker may be killed."""
    with Gateway(copy_places(places, tmp_path_factory.mktemp("own") / "root")) as running:
        yield running


def test_a_cancelled_job_leaves_no_row(own):
    place = ask(own, as_npy(draw_volume(2000))).headers["location"]
    wait(own, place, states=("running",))
    assert own.client.delete(place, headers=NORTH).status_code == 202
    told = wait(own, place)
    assert told["state"] == "cancelled"
    assert not rows_of(own.places, told["id"])
    assert not (own.places.var / "jobs" / told["id"] / "body").exists()


def test_a_killed_worker_comes_back_and_a_job_is_tried_once_more_and_no_more(own):
    patient = ask(own, as_npy(draw_volume(1500))).headers["location"]
    wait(own, patient, states=("running",))
    killed = worker_of(own)
    killed.send_signal(signal.SIGKILL)
    told = wait(own, patient)
    assert (told["state"], told["attempts"]) == ("done", 2)
    assert len(rows_of(own.places, told["id"])) == 1
    assert worker_of(own).pid != killed.pid
    fatal = ask(own, as_npy(draw_volume(3000))).headers["location"]
    for attempt in (1, 2):
        own.wait(lambda n=attempt: own.client.get(fatal, headers=NORTH).json()["attempts"] == n, 60)
        worker_of(own).send_signal(signal.SIGKILL)
    told = wait(own, fatal)
    assert (told["state"], told["problem"]["type"]) == ("failed", "/problems/internal")


class Listening:
    """An engine that remembers how large its batches were."""

    def __init__(self, engine):
        self.name, self.run_, self.sizes = engine.name, engine.run, []

    def run(self, batch):
        self.sizes.append(len(batch))
        return self.run_(batch)


def test_windows_of_jobs_that_share_a_package_are_one_batch(places, tmp_path):
    copied = copy_places(places, tmp_path / "root")
    stopping, store = threading.Event(), JobStore(copied.var)
    worker = JobWorker(copied, stopping)
    engines = []

    def listen(version, digest):
        opened = worker._open_package(version, digest)
        engines.append(Listening(opened.engine))
        return replace(opened, engine=engines[-1])

    worker._open = listen
    numbers = []
    for number in range(2):
        draft = store.draft("north", 0)
        (draft / "body").write_bytes(as_npy(draw_volume()))
        job = Job(id=str(uuid.uuid4()), kind=JobKind.VOLUME, task="discs", site="north", request_id="r",
                  form=NPY, image="", subject=None, created=f"{number}")  # fmt: skip
        store.admit(job, draft)
        numbers.append(job.id)
    worker._admit()
    worker._turn()
    assert [size for engine in engines for size in engine.sizes] == [12]
    assert [store.read(number).state for number in numbers] == ["done", "done"]


def test_a_site_may_not_fill_the_queue(own):
    body = as_npy(draw_volume(1000))
    answers = [ask(own, body) for _ in range(18)]
    refused = [one for one in answers if one.status_code == 429]
    assert refused
    assert refused[0].json()["type"] == "/problems/overloaded"
    assert int(refused[0].headers["retry-after"]) >= 1
    for one in answers:
        if one.status_code == 202:
            own.client.delete(one.headers["location"], headers=NORTH)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_survive_the_gateway(places, tmp_path, end):
    copied = copy_places(places, tmp_path / "root")
    with Gateway(copied) as first:
        running = ask(first, as_npy(draw_volume(2500))).headers["location"]
        queued = [ask(first, as_npy(draw_volume())).headers["location"] for _ in range(2)]
        wait(first, running, states=("running",))
        worker = worker_of(first)
        first.process.send_signal(end)  # to the supervisor alone
        first.process.wait(30)
        worker.wait(30)
    with Gateway(copied) as second:
        for place in (running, *queued):
            told = wait(second, place)
            assert (told["state"], told["attempts"]) == ("done", 1), told  # that was not the job's fault
            assert len(rows_of(copied, told["id"])) == 1


def test_the_gateway_imports_no_torch_for_jobs():
    code = "import sys, services.job_routes; print([m for m in ('torch', 'scipy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
