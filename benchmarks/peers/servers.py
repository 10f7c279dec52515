"""Each stack as a server that can be started, asked, held still, and ended by process id whatever happens."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from packages import SITE, draw_payload

from imaging.config import Places
from services.keys import create_key
from services.stack import free_port

HERE = Path(__file__).parent
START_S = 120
BOUNDARY = "b4c2f0e1d9"
QUIET = {  # one thread each, and nothing is told to anybody
    "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "BENTOML_DO_NOT_TRACK": "true", "FORMULARY_TRACKING": "off",
    "MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1",
    "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}", "PYTHONWARNINGS": "ignore",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
}  # fmt: skip


class Failed(Exception):
    """A stack did not start, or answers wrongly."""


@dataclass(frozen=True)
class Stack:
    """How a server is started and asked.

    Attributes:
        name: as it stands in the table.
        command: to start it; `PORT` in it becomes the port.
        body, kind: of a request, and its content type.
        path: of predictions; `ready`: of what answers 200 once it can be asked.
        settings: environment beside `QUIET`.
        headers: of a request, beside type and length.
    """

    name: str
    command: list[str]
    body: bytes
    kind: str
    path: str = "/predict"
    ready: str = "/openapi.json"
    settings: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


NULL = Stack("null", [sys.executable, str(HERE / "client.py"), "--null", "PORT"], b"x" * 8192, "text/plain")


def list_stacks(places: Places, model: str, engine: str) -> list[Stack]:
    """Ours first, then every peer."""
    package, scratch = str(places.stage(model, "package")), places.root / "peers"
    body, kind = draw_payload(model)
    multipart = (wrap(body, kind), f"multipart/form-data; boundary={BOUNDARY}")
    asked = {"image": base64.b64encode(body).decode()}
    records = json.dumps({"dataframe_records": [asked]}).encode()
    told = {"BENCH_PACKAGE": package, "BENCH_ENGINE": engine, "BENCH_PEERS": str(HERE)}

    def script(name: str, *rest: str) -> list[str]:
        return [sys.executable, str(HERE / f"{name}.py"), package, engine, "PORT", *rest]

    saved = str(scratch / "mlflow")
    bento = ["-m", "bentoml", "serve", "bentoml_textbook:Textbook", "--host", "127.0.0.1", "--port", "PORT"]
    flow = ["-m", "mlflow", "models", "serve", "-m", saved, "--env-manager", "local", "--host", "127.0.0.1",
            "--port", "PORT", "--workers", "1"]  # fmt: skip
    scratch.mkdir(exist_ok=True)
    if not Path(saved).exists():
        run_quietly([sys.executable, str(HERE / "mlflow_model.py"), saved], told)
    return [
        describe_ours(places, model, engine, {}),
        Stack("fastapi greedy", script("fastapi_greedy"), body, kind),
        Stack("fastapi naive", script("fastapi_naive"), *multipart),
        Stack("litserve", script("litserve_batched"), json.dumps(asked).encode(), "application/json",
              ready="/health"),
        Stack("bentoml pair", [sys.executable, *bento], *multipart, ready="/readyz",
              settings={**told, "BENTOML_HOME": str(scratch / "bentoml")}),
        Stack("mlflow", [sys.executable, *flow], records, "application/json", "/invocations", "/ping",
              told | {"UVICORN_LOG_LEVEL": "warning", "UVICORN_ACCESS_LOG": "false"}),
        Stack("ray serve", script("ray_serve", str(scratch / "ray")), body, kind, ready="/-/healthz"),
    ]  # fmt: skip


def wrap(body: bytes, kind: str) -> bytes:
    """A file as the only field of a form."""
    told = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="image"\r\n'
    return f"{told}Content-Type: {kind}\r\n\r\n".encode() + body + f"\r\n--{BOUNDARY}--\r\n".encode()


def describe_ours(places: Places, model: str, engine: str, settings: dict[str, str]) -> Stack:
    """The gateway with journal, metrics and access control on."""
    body, kind = draw_payload(model)
    _, key = create_key(places, SITE, 1, "bench")
    lies = {"FORMULARY_ROOT": str(places.root), "FORMULARY_VAR": str(places.var), "FORMULARY_ENGINE": engine}
    command = [sys.executable, "-m", "formulary", "services", "serve", "--port", "PORT"]
    return Stack("formulary", command, body, kind, f"/v1/models/{model}/predict", "/readyz",
                 {**lies, **settings}, {"Authorization": f"Bearer {key}"})  # fmt: skip


def run_quietly(command: list[str], settings: dict[str, str]) -> str:
    """What a command writes.

    Raises:
        Failed: it did not end well.
    """
    done = subprocess.run(command, env={**os.environ, **QUIET, **settings}, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{Path(command[1]).name} ended with {done.returncode}: {done.stderr[-300:]}")
    return done.stdout


def measure_alone(package: Path, engine: str, *how: str) -> Any:
    """What peers/alone.py tells."""
    return json.loads(run_quietly([sys.executable, str(HERE / "alone.py"), str(package), engine, *how], {}))


def find_probabilities(told: Any) -> list[float]:
    """The list of probabilities in whatever form a stack answers."""
    while isinstance(told, dict):
        told = next(
            (told[name] for name in ("probabilities", "predictions") if name in told), list(told.values())
        )
    return find_probabilities(told[0]) if isinstance(told[0], list | dict) else [float(one) for one in told]


class Server:
    """A stack's processes. Once they are ready they are held still; `measure` wakes them for its time.

    Args:
        stack: what to start.
        log: where its output goes.
    """

    def __init__(self, stack: Stack, log: Path) -> None:
        self.stack, self._log, self.port = stack, log, free_port()
        self.start_s = 0.0
        command = [str(self.port) if part == "PORT" else part for part in stack.command]
        with log.open("wb") as stream:
            self._process = psutil.Popen(
                command,
                env={**os.environ, **QUIET, **stack.settings},
                cwd=log.parent,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._known: dict[int, psutil.Process] = {}

    def wait(self) -> None:
        """Wait until it is ready.

        Raises:
            Failed: it ended, or was not ready in time.
        """
        begun = time.perf_counter()
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() - begun > START_S:
                raise Failed(f"it did not start: {self._log.read_text(errors='replace')[-400:]!r}")
            time.sleep(0.1)
        self.start_s = round(time.perf_counter() - begun, 1)
        self._hold()

    def check(self, expected: list[float]) -> None:
        """Hold its answer to the engine's.

        Raises:
            Failed: it is another one.
        """
        self._wake()
        headers = {"Content-Type": self.stack.kind, **self.stack.headers}
        answer = httpx.post(self._url(self.stack.path), content=self.stack.body, headers=headers, timeout=60)
        if answer.status_code != 200:
            raise Failed(f"it answers {answer.status_code}: {answer.text[:300]!r}")
        found = find_probabilities(answer.json())
        if max(abs(a - b) for a, b in zip(found, expected, strict=True)) > 0.02:
            raise Failed(f"it answers {found}, and the engine {expected}")
        self._hold()

    def measure(self, clients: int, seconds: float) -> dict[str, float]:
        """Answers a second, latency, and what an answer costs its processes; their memory afterwards."""
        self._wake()
        try:
            with start_clients(self, clients, seconds) as read:
                before = self._cpu_s()
                told = read()
                used = self._cpu_s() - before
            memory = sum(one.memory_info().rss for one in self._family()) / 2**20
        except psutil.NoSuchProcess as error:
            raise Failed(f"a process of it ended: {error}") from error
        finally:
            self._hold()
        if not told["answers"]:
            raise Failed("it answered nothing")
        return {"rps": told["answers"] / told["seconds"], "p50_ms": told["p50_ms"], "p99_ms": told["p99_ms"],
                "cpu_ms": 1000 * used / told["answers"], "rss_mb": memory, "refused": told["refused"],
                "client_cpu_ms": told["client_cpu_ms"]}  # fmt: skip

    def request(self) -> bytes:
        """The bytes that each client sends again and again."""
        stack = self.stack
        fields = {
            "Host": "bench",
            "Content-Type": stack.kind,
            "Content-Length": len(stack.body),
            **stack.headers,
        }
        lines = [f"POST {stack.path} HTTP/1.1", *(f"{name}: {told}" for name, told in fields.items()), "", ""]
        return "\r\n".join(lines).encode() + stack.body

    def stop(self) -> None:
        """Ask, wait, and kill what is left of it."""
        family = self._family()
        self._wake()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.terminate()
        _, left = psutil.wait_procs(family, 15)
        for one in {*left, *self._family()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, 5)

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            headers = self.stack.headers
            return httpx.get(self._url(self.stack.ready), headers=headers, timeout=5).status_code == 200
        return False

    def _family(self) -> list[psutil.Process]:
        """Every process of it that lives; whoever was seen once stays known, should its parent go first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in (self._process, *self._process.children(recursive=True)):
                self._known[one.pid] = psutil.Process(one.pid)
        return [
            one for one in self._known.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE
        ]

    def _cpu_s(self) -> float:
        times = [one.cpu_times() for one in self._family()]
        return sum(spent.user + spent.system for spent in times)

    def _hold(self) -> None:
        for one in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()

    def _wake(self) -> None:
        for one in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume()


@contextlib.contextmanager
def start_clients(server: Server, clients: int, seconds: float) -> Iterator[Callable[[], dict[str, float]]]:
    """Clients that have warmed up and ask from now on; what is yielded waits for what they found."""
    request = base64.b64encode(server.request()).decode()
    asked = {"port": server.port, "request": request, "clients": clients, "seconds": seconds}
    process = subprocess.Popen([sys.executable, str(HERE / "client.py")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        process.stdout.readline()
        yield lambda: json.loads(process.stdout.readline())
        process.wait(60)
    finally:
        process.kill()
        process.wait()
