"""A request for a prediction on its way, as it is handed from thread to thread."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from monitoring.journal import Prediction
from services import guard
from services.findings import Found, Taken
from services.runner import Ran
from services.served import Served
from services.vault import Held


@dataclass(slots=True, eq=False)
class Case:
    """One request on its way; the threads hand it on and fill it in.

    Attributes:
        asked: task, site and number of the request.
        served: the version that answers, from the first look to the last.
        deadline: `time.monotonic` until which an answer is wanted.
        form: of the mask.
        wants_heat: whether the heat map is asked for.
        done: resolves in the event loop when `row` is durable, or `error` is set.
        held: the body, where the site keeps pixels, until they are kept or let go.
    """

    asked: tuple[str, str, str]
    served: Served
    deadline: float
    form: str
    wants_heat: bool
    done: asyncio.Future[None]
    headers: guard.Headers
    held: Held | None = None
    taken: Taken = field(init=False)
    image: str = ""
    ran: Ran = field(init=False)
    found: Found | None = None
    shown: dict[str, Any] = field(default_factory=dict)
    mask: bytes | None = None
    heat: dict[str, Any] = field(default_factory=dict)
    row: Prediction | None = None
    error: Exception | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def stop(self, stage: str) -> None:
        """The time since the last stage ended belongs to this one."""
        now = time.perf_counter()
        self.stages_ms[stage] = round(1000 * (now - self.last), 3)
        self.last = now
