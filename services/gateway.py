"""The BentoML service. `bentoml serve services.gateway:Gateway` loads this file.

The serving process imports no mlflow, monai, evidently, great_expectations or dvc.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any, cast

import bentoml
from starlette.types import ASGIApp, Receive, Scope, Send

from imaging.config import read_places
from imaging.terminal import configure_logs
from services.routes import Routes
from services.slots import Slots

configure_logs(("imaging", "registry", "monitoring", "services"))
PLACES = read_places()
APPLICATION = Routes(PLACES, Slots(PLACES, os.environ.get("FORMULARY_ENGINE", "openvino/f32"))).build()


def end_with(parent: int) -> None:
    """Stop this worker once BentoML's supervisor is gone: an orphan would answer on and hold the port."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


class Front:
    """Every HTTP request is ours: BentoML's own pages, pickles and file fields are out of reach."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send HTTP to our application; the rest (start and stop) to BentoML."""
        await (APPLICATION if scope["type"] == "http" else self._app)(scope, receive, send)


@bentoml.service(
    workers=1,
    metrics={"enabled": False},
    tracing={"excluded_urls": ["/.*"]},
    traffic={"timeout": 60},
    logging={"access": {"enabled": False}},
    http={"host": "127.0.0.1"},
)
@bentoml.asgi_app(APPLICATION, path="/")
class Gateway:
    """Carries our ASGI application: processes, ports and start-up are BentoML's."""

    def __init__(self) -> None:
        """Runs in the worker that answers."""
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


cast("Any", Gateway).add_asgi_middleware(Front)
