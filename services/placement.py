"""Which runner process has which device: started, watched, started again (profile gpu).

Their sockets stay open here meanwhile, so that a batch waits for a runner that starts again.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import logging
import math
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from imaging.errors import ConfigError

LOG = logging.getLogger(__name__)
WATCH_S = 0.1
MOST_BACKOFF_S = 10.0
SHUNNED_S = 5.0
STEADY_S = 30.0  # a runner that lived so long is started again at once
# What `bentoml serve` runs for a service; it alone takes a socket from outside.
COMMAND = (sys.executable, "-m", "_bentoml_impl.worker.service", "services.device:Device", "--worker-id", "1")


def read_devices() -> tuple[str, ...]:
    """The devices of FORMULARY_DEVICES, e.g. cuda:0,cuda:1; each gets one runner.

    Raises:
        ConfigError: not such a list, a device twice, or two kinds.
    """
    told = tuple(os.environ.get("FORMULARY_DEVICES", "cuda:0").split(","))
    kinds = {(found := re.fullmatch(r"(cpu|cuda):\d{1,3}", name)) and found[1] for name in told}
    if len(kinds) != 1 or None in kinds or len(set(told)) < len(told):
        raise ConfigError(
            f"FORMULARY_DEVICES={','.join(told)[:100]!r} is no list of devices.", "Say e.g. cuda:0,cuda:1."
        )
    return told


@dataclass
class Child:
    """A runner process: where it listens, since when it lives, when to start it again, what it does."""

    device: str
    path: Path
    process: subprocess.Popen[bytes] | None = None
    born: float = 0.0
    wait_s: float = 0.0
    busy: int = 0
    failed: float = -math.inf


class Devices:
    """The runners of this machine, started and watched by the first gateway worker that comes.

    Args:
        names: cpu:0, cuda:1, ...
        folder: of the sockets; workers of one gateway share it. No other user may enter it.
    """

    def __init__(self, names: tuple[str, ...], folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        told = folder.lstat()
        if told.st_uid != os.getuid() or not stat.S_ISDIR(told.st_mode) or told.st_mode & 0o077:
            raise ConfigError(f"{folder} is open to others.", "Remove it, or set TMPDIR.")
        self._folder = folder
        self.children = [Child(name, folder / f"{number}.sock") for number, name in enumerate(names)]
        self._turn = itertools.count()
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._owner = False
        self._thread = threading.Thread(target=self._keep, name="devices", daemon=True)
        self._thread.start()

    def take(self, avoided: Child | None = None) -> Child:
        """The device with the fewest batches on it, in turn where they are equal; `give_back` it.

        One that failed lately comes last.
        """
        late = time.monotonic() - SHUNNED_S
        with self._lock:
            turn = next(self._turn)
            count = len(self.children)
            order = [self.children[(turn + step) % count] for step in range(count)]
            best = min(order, key=lambda child: (child is avoided, child.failed > late, child.busy))
            best.busy += 1
            return best

    def give_back(self, child: Child) -> None:
        """A batch left the device."""
        with self._lock:
            child.busy -= 1

    def stop(self) -> None:
        """End the runners that this process started."""
        self._stopped.set()
        if self._owner:
            self._thread.join()

    def _keep(self) -> None:
        """Hold the lock of the folder, and with it the runners, until the end; others wait here."""
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._owner = True
            self._folder.mkdir(mode=0o700, exist_ok=True)  # a worker that ended took it away
            sockets = [_listen(child.path) for child in self.children]
            while not self._stopped.wait(WATCH_S):
                for child, listening in zip(self.children, sockets, strict=True):
                    _keep_alive(child, listening)
            living = [child.process for child in self.children if child.process]
            for process in living:
                process.terminate()
            for process in living:
                _wait(process)
            shutil.rmtree(self._folder, ignore_errors=True)


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(128)
    return listening


def _keep_alive(child: Child, listening: socket.socket) -> None:
    """Start a runner that is not there; one that keeps ending waits longer each time."""
    now = time.monotonic()
    if child.process and child.process.poll() is None:
        return
    if child.process:
        steady = now - child.born > STEADY_S
        child.wait_s = 0.0 if steady else min(MOST_BACKOFF_S, 2 * child.wait_s + WATCH_S)
        LOG.error("the runner of %s ended with code %s", child.device, child.process.returncode)
        child.process, child.born = None, now
    if now < child.born + child.wait_s:
        return
    command = [*COMMAND, "--fd", str(listening.fileno()), "--timeout-keep-alive", "86400"]
    environment = {**os.environ, "FORMULARY_DEVICE": child.device}
    child.process, child.born = subprocess.Popen(
        command, env=environment, pass_fds=[listening.fileno()], start_new_session=True
    ), now  # fmt: skip


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@functools.cache
def start_devices() -> Devices:
    """The runners of FORMULARY_DEVICES; started once, ended with this process.

    Raises:
        ConfigError: FORMULARY_DEVICES cannot be read.
    """
    folder = Path(tempfile.gettempdir()) / f"formulary-{os.getuid()}-{os.getppid()}"
    return Devices(read_devices(), folder)


def stop_devices() -> None:
    """End what `start_devices` started here; without it they end half a second after this process."""
    if start_devices.cache_info().currsize:
        start_devices().stop()
        start_devices.cache_clear()
