"""The runner process of one device: a BentoML service on a unix socket that runs batches, and nothing else.

`services.placement` starts one for each device. It verifies and opens packages itself, by digest.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import bentoml
import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from imaging.config import Places, read_params, read_places
from imaging.errors import FormularyError, NotReady, TrustError
from imaging.terminal import configure_logs
from registry.engines import Engine, check_parity, open_engine
from registry.evidence import verify_package
from registry.ledger import open_ledger
from registry.package import read_contract, shelf
from services.front import Front, bound_heads, end_with_parent

GRACE_S = 120.0
Key = tuple[str, str]


class Packages:
    """What one device holds open: every site's champion and previous version, and what is tried beside them.

    Args:
        places: where the ledger and the packages lie.
        device: cpu:0, cuda:1, ...; one that is missing is an error of `load`, and never another device.
    """

    def __init__(self, places: Places, device: str) -> None:
        self._places, self._device = places, device
        self._ledger = open_ledger(places.var)
        self._held: dict[Key, Engine] = {}
        self._used: dict[Key, float] = {}
        self._lock = threading.Lock()

    def find(self, digest: str, engine: str) -> Engine:
        """What runs a package.

        Raises:
            NotReady: it was not loaded here, or this process is younger than that.
        """
        held = self._held.get((digest, engine))
        if held is None:
            raise NotReady(f"{self._device} has not loaded {digest[:19]}.", "Load it first.")
        self._used[digest, engine] = time.monotonic()
        return held

    def load(self, digest: str, engine: str) -> Engine:
        """Verify and open a package, hold it to its golden cases and warm it up; once, however often asked.

        Raises:
            TrustError: its signature, digest or parity does not hold.
            DeviceMissing: the device is not there.
        """
        with self._lock:
            if (digest, engine) not in self._held:
                self._held[digest, engine] = self._open(digest, engine)
                self._used[digest, engine] = time.monotonic()
                self._drop()
            return self._held[digest, engine]

    def _open(self, digest: str, engine: str) -> Engine:
        folder = shelf(self._places.var, digest)
        verify_package(folder, self._ledger)
        contract = read_contract(folder)
        name, _, precision = engine.partition("/")
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        opened = open_engine(folder, name, precision, threads, device=self._device)
        check_parity(opened, folder, contract)
        for size in (1, contract.max_batch):
            opened.run(np.zeros((size, *contract.shape), np.float32))
        return opened

    def _drop(self) -> None:
        """Let go of what stands in no slot of the ledger and was not asked for lately."""
        states = [self._ledger.state(task) for task in read_params(self._places).tasks]
        slots = [slot for state in states for slot in state.slots().values()]
        kept = {placement.digest for slot in slots for placement in slot.values()}
        late = time.monotonic() - GRACE_S
        for key in [key for key, used in self._used.items() if key[0] not in kept and used < late]:
            del self._held[key], self._used[key]


class Service:
    """Two routes and a sign of life. A refusal is JSON: error (class of imaging.errors), fact, fix."""

    def __init__(self, packages: Packages) -> None:
        self._packages = packages
        # One batch computes while the next one arrives: two in flight, and the device is never shared.
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="device")

    def build(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/livez", lambda _: Response("alive\n"), methods=["GET"]),
            Route("/load", self.load, methods=["POST"]),
            Route("/run", self.run, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={FormularyError: _refuse})

    async def load(self, request: Request) -> Response:
        """Have a package ready; answers the name of the engine that opened it."""
        opened = await asyncio.to_thread(self._packages.load, *_read_key(request))
        return Response(orjson.dumps({"engine": opened.name}))

    async def run(self, request: Request) -> Response:
        """A batch, raw float32 of the shape in X-Shape; answers logits, heat and embedding, in turn."""
        engine = self._packages.find(*_read_key(request))
        shape = tuple(map(int, request.headers["x-shape"].split(",")))
        body = bytearray()  # engines want memory that can be written
        async for part in request.stream():
            body += part
        batch = np.frombuffer(body, np.float32).reshape(shape)
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._lane, engine.run, batch)
        except Exception as error:  # engines' own errors have no class in common
            raise TrustError(f"{engine.name} failed: {type(error).__name__}.", "Qualify it again.") from error
        parts = (answers.logits, answers.heat, answers.embedding)
        shapes = ";".join(",".join(map(str, part.shape)) for part in parts)
        content = b"".join(np.ascontiguousarray(part, np.float32).data.cast("B") for part in parts)
        return Response(content, headers={"X-Shapes": shapes})


def _read_key(request: Request) -> Key:
    return request.headers["x-digest"], request.headers["x-engine"]


def _refuse(_: Request, error: Exception) -> Response:
    told = {"error": type(error).__name__, **{name: getattr(error, name) for name in ("fact", "fix")}}
    return Response(orjson.dumps(told), 409)


configure_logs(("imaging", "registry", "monitoring", "services"))
bound_heads()
DEVICE = os.environ.get("FORMULARY_DEVICE", "cpu:0")
APPLICATION = Service(Packages(read_places(), DEVICE)).build()


@bentoml.service(
    workers=1,
    resources={"gpu": 1} if DEVICE.startswith("cuda") else {"cpu": "1"},
    metrics={"enabled": False},
    tracing={"excluded_urls": ["/.*"]},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(APPLICATION, path="/")
class Device:
    """Carries our ASGI application; FORMULARY_DEVICE says which device it is."""

    def __init__(self) -> None:
        """Runs in the process that owns the device."""
        end_with_parent()


cast("Any", Device).add_asgi_middleware(Front, application=APPLICATION)
