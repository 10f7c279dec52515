"""Keep-alive clients in a process of their own, that ask as fast as they are answered.

It reads one line of JSON (port, request in base64, clients, seconds), warms up, writes `go`, asks, and writes
one line of JSON: answers (200), refused (any other, and connections that broke), seconds, p50_ms, p99_ms, and
the CPU milliseconds that an answer cost this process. It asks longer where answers are few: a batch ends at
once, and a second that holds one or two of them tells little. Given `--null PORT`, it answers the same few
bytes to everybody: what the clients themselves can do.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from typing import Any

import uvloop

WARM_S, LAST_S, LONGEST = 0.5, 15.0, 10.0
LEAST = 2.0  # answers a client and second of measurement
NULL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"


class Client(asyncio.Protocol):
    """One connection: the next request leaves when the last answer is whole."""

    def __init__(self, load: Load) -> None:
        self._load, self._held, self._start = load, b"", 0.0

    def connection_made(self, transport: Any) -> None:
        """Ask for the first time."""
        self._transport = transport
        self._load.connected += 1
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Ask again once all of an answer is there."""
        self._held += data
        if is_whole(self._held):
            self._load.count(self._held, time.perf_counter() - self._start)
            refused, self._held = self._held[9:12] == b"429", b""
            if refused:  # as told: Retry-After is a second at least
                asyncio.get_running_loop().call_later(1.0, self._ask)
            else:
                self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        """A server that closes is counted, and asked anew."""
        self._load.connected -= 1
        if self._load.going:
            self._load.refused += 1
            self._load.open()

    def _ask(self) -> None:
        if not self._load.going:
            self._transport.close()
            return
        self._start = time.perf_counter()
        self._transport.write(self._load.request)


def is_whole(held: bytes) -> bool:
    """Whether an answer has arrived with all of its body."""
    head, found, body = held.partition(b"\r\n\r\n")
    if not found:
        return False
    fields = head.lower()
    _, told, length = fields.partition(b"content-length:")
    if told:
        return len(body) >= int(length.split(b"\r\n", 1)[0])
    return body.endswith(b"0\r\n\r\n")  # chunked


class Load:
    """What all clients together asked and were told."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port, self.request, self.going = port, request, True
        self.spent: list[float] = []
        self.refused = self.connected = 0
        self._opening: set[asyncio.Task] = set()

    def count(self, answer: bytes, seconds: float) -> None:
        """Keep the time of a 200; count what else was said."""
        if answer[9:12] == b"200":
            self.spent.append(seconds)
        else:
            self.refused += 1

    def open(self) -> None:
        """One more connection."""
        task = asyncio.get_running_loop().create_task(self._connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        await asyncio.sleep(0.001 * (self.refused > 0))
        await asyncio.get_running_loop().create_connection(lambda: Client(self), "127.0.0.1", self._port)


async def ask(told: dict[str, Any]) -> None:
    load = Load(told["port"], base64.b64decode(told["request"]))
    for _ in range(told["clients"]):
        load.open()
    await asyncio.sleep(WARM_S)
    print("go", flush=True)
    load.spent, load.refused = [], 0
    start, used = time.perf_counter(), time.process_time()
    least, most = LEAST * told["clients"] * told["seconds"], start + LONGEST * told["seconds"]
    await asyncio.sleep(told["seconds"])
    while len(load.spent) < least and time.perf_counter() < most:
        await asyncio.sleep(told["seconds"] / 4)
    spent, took, used = sorted(load.spent), time.perf_counter() - start, time.process_time() - used
    load.going = False
    share = [
        spent[min(int(len(spent) * part), len(spent) - 1)] * 1000 if spent else 0.0 for part in (0.5, 0.99)
    ]
    print(json.dumps({
        "answers": len(spent), "refused": load.refused, "seconds": took, "p50_ms": share[0],
        "p99_ms": share[1], "client_cpu_ms": 1000 * used / max(len(spent), 1),
    }), flush=True)  # fmt: skip
    while load.connected and time.perf_counter() < most + LAST_S:  # or the next ones would wait for ours
        await asyncio.sleep(0.01)


class Null(asyncio.Protocol):
    """A server that thinks of nothing."""

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self._transport, self._held = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer each whole request."""
        self._held += data
        if is_whole(self._held) or self._held.startswith(b"GET"):
            self._held = b""
            self._transport.write(NULL)


async def answer_nothing(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Null, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--null"]:
        uvloop.run(answer_nothing(int(sys.argv[2])))
    else:
        uvloop.run(ask(json.loads(sys.stdin.readline())))
