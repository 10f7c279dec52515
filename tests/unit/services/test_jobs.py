"""The store of jobs, whatever happens in its folder meanwhile."""

import uuid
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest

from imaging.errors import Overloaded, WrongType
from imaging.vocabulary import ContentType, JobKind
from services import job_routes
from services.job_room import FREE_BYTES, HELD_BYTES, WAITING_PER_SITE
from services.jobs import Job, JobStore

Disk = namedtuple("Disk", "free")


def make_job():
    return Job(id=str(uuid.uuid4()), kind=JobKind.VOLUME, task="t", site="north", request_id="r",
               form=ContentType.NPY, image="", subject=None, created="0")  # fmt: skip


def claim(store, site="north", size_bytes=5):
    try:
        return store.draft(site, size_bytes)
    except Overloaded:
        return None


def test_room_is_found_while_others_erase_files(tmp_path):
    store = JobStore(tmp_path)
    (store.draft("east", 0) / "body").symlink_to("gone")  # there when it is listed, and not when it is read
    (store.draft("east", 5) / "body").write_bytes(b"12345")
    with pytest.raises(Overloaded, match="would hold 4096 MiB"):
        store.draft("north", HELD_BYTES - 4)
    store.draft("north", HELD_BYTES - 5)  # what was refused left nothing


def test_bodies_that_arrive_at_once_count_for_their_site_before_they_are_here(tmp_path):
    store = JobStore(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        drafts = list(pool.map(lambda _: claim(JobStore(tmp_path)), range(WAITING_PER_SITE + 8)))
    assert sum(draft is not None for draft in drafts) == WAITING_PER_SITE
    assert claim(store, "east")
    draft = next(filter(None, drafts))
    (draft / "body").write_bytes(b"12345")
    store.admit(make_job(), draft)
    assert claim(store) is None  # a job waits where a body arrived


def test_what_is_claimed_is_as_good_as_written(tmp_path):
    store = JobStore(tmp_path)
    assert claim(store, "north", HELD_BYTES - 10)
    assert claim(store, "east", 20) is None


def test_jobs_leave_the_journal_its_disk_and_that_is_asked_again_when_the_body_is_here(tmp_path, monkeypatch):
    store, disk = JobStore(tmp_path), {"free": FREE_BYTES + 100}
    monkeypatch.setattr("services.job_room.shutil.disk_usage", lambda _: Disk(disk["free"]))
    draft = store.draft("north", 60)
    assert claim(store, "east", 60) is None
    (draft / "body").write_bytes(b"1" * 60)
    disk["free"] = FREE_BYTES - 1
    with pytest.raises(Overloaded, match="too full"):
        store.admit(make_job(), draft)
    assert store.waiting() == []


def test_a_gradient_is_refused_at_once_where_there_is_no_torch(monkeypatch):
    class Asked:
        query_params = {"method": "gradient"}  # noqa: RUF012

    assert job_routes._read_method(Asked, JobKind.EXPLANATION) == "gradient"
    monkeypatch.setattr(job_routes, "find_spec", lambda _: None)
    with pytest.raises(WrongType, match="no torch"):
        job_routes._read_method(Asked, JobKind.EXPLANATION)
