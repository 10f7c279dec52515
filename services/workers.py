"""The workers of one gateway: each says which state of the ledger it has loaded, and all swap together."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import psutil

LOG = logging.getLogger(__name__)
PATIENCE_S = 15.0
LOOK_S = 0.01


class Workers:
    """Files of one folder, named by process: 'I have loaded generation n'.

    Args:
        var: of the checkout.
        count: workers of this gateway; of one nobody waits for anybody.
    """

    def __init__(self, var: Path, count: int) -> None:
        self._count = count
        self._folder = var / "serving" / str(os.getppid())

    def wait_for_all(self, generation: int) -> None:
        """Say that a generation is loaded, and return when every living worker has said so, or after 15 s."""
        if self._count == 1:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = self._folder / str(os.getpid())
        (draft := mine.with_suffix(".draft")).write_text(str(generation))
        draft.rename(mine)
        end = time.monotonic() + PATIENCE_S
        while late := [path.name for path in self._living() if int(path.read_text()) < generation]:
            if time.monotonic() > end:
                LOG.warning("worker %s is late; the others go on", ", ".join(late))
                break
            time.sleep(LOOK_S)

    def _living(self) -> list[Path]:
        found = []
        for path in self._folder.iterdir():
            if not path.suffix and psutil.pid_exists(int(path.name)):
                found.append(path)
            elif not path.suffix:
                path.unlink(missing_ok=True)  # of a worker that ended; another took its place
        return found
