"""The BentoML service. `bentoml serve services.gateway:Gateway` loads this file.

The serving process imports no mlflow, monai, evidently, great_expectations or dvc.
"""

from __future__ import annotations

import os
from typing import Any, cast

import bentoml

from imaging.config import read_places
from imaging.terminal import configure_logs
from monitoring.telemetry import WORKERS
from services.credentials import is_required
from services.front import Front, bound_heads, end_with_parent
from services.release import unpack_release
from services.routes import Routes
from services.slots import Slots

configure_logs(("imaging", "registry", "monitoring", "services"))
bound_heads()
PLACES = read_places()
unpack_release(PLACES)
APPLICATION = Routes(PLACES, Slots(PLACES, os.environ.get("FORMULARY_ENGINE", "")), is_required()).build()


@bentoml.service(
    workers=WORKERS,
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
        end_with_parent()


cast("Any", Gateway).add_asgi_middleware(Front, application=APPLICATION)
