"""The store of jobs, whatever happens in its folder meanwhile."""

import pytest

from imaging.errors import Overloaded
from services.jobs import HELD_BYTES, JobStore


def test_room_is_found_while_others_erase_files(tmp_path):
    store = JobStore(tmp_path)
    (store.draft() / "body").symlink_to("gone")  # there when the folder is read, and not when the file is
    (store.draft() / "body").write_bytes(b"12345")
    store.check_room("north", HELD_BYTES - 5)
    with pytest.raises(Overloaded):
        store.check_room("north", HELD_BYTES - 4)
