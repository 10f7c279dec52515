"""The workers of one gateway: a version answers once each of them has it open."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

PATIENCE_S = 15.0


class Workers:
    """Files of one folder, named by process: which packages it has open.

    Args:
        var: of the checkout.
        count: workers of this gateway; of one nobody waits for anybody.
    """

    def __init__(self, var: Path, count: int) -> None:
        self._count = count
        self._folder = var / "serving" / str(os.getppid())
        self._since: dict[str, float] = {}

    def announce(self, names: Iterable[str]) -> None:
        """Say what this worker has open."""
        now = time.monotonic()
        self._since = {name: self._since.get(name, now) for name in names}
        if self._count == 1:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = self._folder / str(os.getpid())
        (draft := mine.with_suffix(".draft")).write_text(json.dumps(list(self._since)))
        draft.rename(mine)

    def all_have(self, name: str) -> bool:
        """Whether every living worker has it open, or this one has waited for the others for 15 s."""
        if self._count == 1 or self._since.get(name, 0.0) < time.monotonic() - PATIENCE_S:
            return True
        return all(name in json.loads(path.read_text()) for path in self._living())

    def _living(self) -> list[Path]:
        found = []
        for path in [one for one in self._folder.iterdir() if not one.suffix]:
            if _is_sibling(int(path.name)):
                found.append(path)
            else:
                path.unlink(missing_ok=True)  # of a worker that ended, or of another time
        return found


def _is_sibling(number: int) -> bool:
    try:
        return bool(psutil.Process(number).ppid() == os.getppid())
    except psutil.NoSuchProcess:
        return False
