"""An engine in other processes: a batch is one hop over a unix socket to a runner (services.device)."""

from __future__ import annotations

import http.client
import logging
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from imaging import errors
from imaging.errors import FormularyError, NotReady, ServingError, TrustError
from registry.engines import Answers, Engine
from services.placement import WATCH_S, Child, Devices, start_devices

LOG = logging.getLogger(__name__)
RUN_S, LOAD_S = 30.0, 300.0  # a socket's patience
LOST = (OSError, http.client.HTTPException)


def open_remote(digest: str, engine: str) -> Engine:
    """Have every device open a package, and give the engine that sends batches to them.

    Args:
        digest: of the package, sha256:...; each runner verifies what lies on the shelf under it.
        engine: e.g. openvino/f32.

    Raises:
        FormularyError: what a runner refused it with; DeviceMissing, TrustError.
        NotReady: a runner does not start.
    """
    return RemoteEngine(start_devices(), digest, engine)


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("runner")
        self._path = path

    def connect(self) -> None:
        """Open the socket, or wait until it is there; a runner that is starting answers later."""
        end = time.monotonic() + (self.timeout or 0)
        while True:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            try:
                return self.sock.connect(str(self._path))
            except (
                FileNotFoundError,
                ConnectionRefusedError,
            ):  # the worker that kept it ended; another follows
                self.sock.close()
                if time.monotonic() > end:
                    raise
            time.sleep(WATCH_S)

    def refresh(self, patience_s: float) -> None:
        """Forget a socket whose other end is gone, so that what fails afterwards was on its way."""
        self.timeout = patience_s
        if self.sock is not None:
            self.sock.settimeout(patience_s)
            if select.select([self.sock], [], [], 0)[0]:
                self.close()


class RemoteEngine:
    """A package on every device, as one engine; it may be called from `lanes` threads at once.

    Args:
        devices: where it runs.
        digest: of the package; runners answer for this one alone, so versions are never mixed.
        engine: e.g. openvino/f32.

    Raises:
        FormularyError: as `open_remote`; only when all devices have it ready does this return.
    """

    def __init__(self, devices: Devices, digest: str, engine: str) -> None:
        self._devices, self._local = devices, threading.local()
        self._headers = {"X-Digest": digest, "X-Engine": engine}
        self.lanes = 2 * len(devices.children)
        with ThreadPoolExecutor(len(devices.children)) as pool:
            self.name = next(iter(set(pool.map(self._load, devices.children))))

    def run(self, batch: NDArray[np.float32]) -> Answers:
        """Answer a batch. One that was on its way when its runner ended is sent again, once.

        Raises:
            ServingError: two runners ended, did not answer, or have lost their device.
            TrustError: the engine failed.
        """
        failed: Child | None = None
        told = ServingError("No device took the batch.", "Ask again.")
        for _ in range(2):
            child = self._devices.take(avoided=failed)
            try:
                return self._run_on(child, np.ascontiguousarray(batch))
            except LOST as error:
                LOG.warning("a batch was lost on %s: %s", child.device, type(error).__name__)
                told = ServingError(f"The runner of {child.device} ended, or does not answer.", "Ask again.")
            except ServingError as error:
                told = error
            finally:
                self._devices.give_back(child)
            failed, child.failed = child, time.monotonic()
        raise told

    def _run_on(self, child: Child, batch: NDArray[np.float32]) -> Answers:
        headers = {**self._headers, "X-Shape": ",".join(map(str, batch.shape))}
        try:
            return self._ask_answers(child, batch, headers)
        except NotReady:  # it was started again since
            self._load(child)
            return self._ask_answers(child, batch, headers)

    def _ask_answers(self, child: Child, batch: NDArray[np.float32], headers: dict[str, str]) -> Answers:
        told, body = self._ask(child, "/run", batch.data.cast("B"), headers)
        shapes = [tuple(map(int, shape.split(","))) for shape in told.split(";")]
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
        parts = np.split(np.frombuffer(body, np.float32), ends[:-1])
        return Answers(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))

    def _load(self, child: Child) -> str:
        try:
            _, body = self._ask(child, "/load", b"", self._headers, LOAD_S)
        except LOST as error:
            raise NotReady(f"The runner of {child.device} does not start.", "Read the log.") from error
        return str(orjson.loads(body)["engine"])

    def _ask(
        self,
        child: Child,
        path: str,
        body: bytes | memoryview,
        headers: dict[str, str],
        patience_s: float = RUN_S,
    ) -> tuple[str, bytearray]:
        """One exchange on this thread's own connection: the X-Shapes header and the body."""
        connection = self._local.__dict__.setdefault(child.device, Connection(child.path))
        try:
            connection.refresh(patience_s)
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            answer = bytearray(response.length or 0)
            if response.readinto(answer) < len(answer):
                raise http.client.IncompleteRead(b"")
        except LOST:
            connection.close()
            raise
        if response.status != 200:
            raise _read_refusal(child, bytes(answer))
        return response.headers.get("X-Shapes", ""), answer


def _read_refusal(child: Child, body: bytes) -> FormularyError:
    """The error that a runner answered, as its own class."""
    try:
        told: dict[str, Any] = orjson.loads(body)
        kind: type[FormularyError] = getattr(errors, told["error"])
        return kind(f"{child.device}: {told['fact']}", told["fix"])
    except (ValueError, KeyError, AttributeError):
        return TrustError(f"The runner of {child.device} failed.", "Read the log.")
