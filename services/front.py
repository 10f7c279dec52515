"""What our BentoML services have in common: HTTP is ours alone, and none outlives its parent."""

from __future__ import annotations

import os
import signal
import threading
import time

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 2**10


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP, which would gather a head without an end, in time that grows with its square."""

    _idle_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take what arrived; end a connection that sends more than a head may have and no body."""
        self._idle_bytes += len(data)
        super().data_received(data)
        if self._idle_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        """A head ended."""
        self._idle_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body came."""
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request ended."""
        self._idle_bytes = 0
        super().on_message_complete()


def bound_heads() -> None:
    """Have uvicorn speak `BoundedHttp`: BentoML starts it, and lets nobody choose."""
    auto.AutoHTTPProtocol = BoundedHttp


class Front:
    """Every HTTP request is ours: BentoML's own pages, pickles and file fields are out of reach.

    Args:
        app: BentoML's application; start and stop go to it.
        application: ours.
    """

    def __init__(self, app: ASGIApp, application: ASGIApp) -> None:
        self._app, self._application = app, application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send HTTP to our application, the rest to BentoML."""
        if scope["type"] == "lifespan":  # BentoML's time limit starts a task and a timer for every request:
            scope["app"].middleware_stack = self  # from now on nothing of it lies between the server and us
        await (self._application if scope["type"] == "http" else self._app)(scope, receive, send)


def end_with_parent() -> None:
    """Stop this process once its parent is gone: an orphan would answer on, and hold port and device."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
