"""How close the gateway comes to its engine, and to the server that a team would write by hand; in one run.

Three candidates answer the same lung-nodule slice with the same package, engine (OpenVINO f32) and one
thread: the engine alone in this process (the ceiling); a FastAPI application with a raw body and a greedy
batcher, which checks, records and refuses nothing (the peer); the gateway, which journals every answer
durably. The servers take turns, so that a machine whose speed drifts is fair to both. Needs a promoted
version: `make demo` first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import httpx
import numpy as np
import psutil
from starlette.requests import Request

from imaging.config import read_places
from imaging.preparation import prepare
from imaging.reading import decode
from imaging.terminal import print_table
from registry.engines import open_engine
from registry.ledger import open_ledger
from registry.package import read_contract, shelf
from services.findings import encode
from services.stack import free_port

TASK, CLIENTS, KIND = "lung-nodule", 32, "application/x-npy"
SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def serve_peer(package: Path, port: int) -> None:
    """The server that a team would write by hand: decode, prepare, queue, answer."""
    import uvicorn
    from fastapi import FastAPI

    contract, engine = read_contract(package), open_engine(package, "openvino", "f32")
    waiting: SimpleQueue[tuple[Any, Future[Any]]] = SimpleQueue()

    def work() -> None:
        while True:
            taken = [waiting.get()]
            while len(taken) < contract.max_batch and not waiting.empty():
                taken.append(waiting.get())
            said = contract.probabilities(engine.run(np.stack([image for image, _ in taken])).logits)
            for (_, future), answer in zip(taken, said, strict=True):
                future.set_result(answer)

    application = FastAPI()

    @application.post("/predict")
    async def predict(request: Request) -> dict[str, list[float]]:
        image = decode(await request.body(), KIND)
        future: Future[Any] = Future()
        waiting.put((prepare(image.pixels, contract.preparation), future))
        return {"probabilities": (await asyncio.wrap_future(future)).tolist()}

    Thread(target=work, daemon=True).start()
    uvicorn.run(application, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def measure_engine(package: Path, seconds: float) -> dict[str, float]:
    """Images a second of the engine alone: one at a time, and in batches of 32."""
    contract, engine = read_contract(package), open_engine(package, "openvino", "f32")
    told = {}
    for size in (1, 32):
        batch = np.zeros((size, *contract.shape), np.float32)
        engine.run(batch)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            engine.run(batch)
            count += size
        told[f"batch_{size}"] = round(count / (time.perf_counter() - start), 1)
    return told


async def load(port: int, request: bytes, clients: int, seconds: float) -> list[float]:
    """Milliseconds of each answer while keep-alive clients ask as fast as they are answered."""
    stop, spent = time.perf_counter() + seconds, []

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < stop:
            start = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"refused: {head.splitlines()[0].decode()}")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            spent.append(1000 * (time.perf_counter() - start))
        writer.close()

    await asyncio.gather(*(ask() for _ in range(clients)))
    return spent


def measure_server(
    process: psutil.Process, port: int, path: str, load_for: tuple[int, float]
) -> dict[str, float]:
    """Requests a second, latency, and what a request costs the server's processes in CPU time."""
    body = encode(np.full((64, 64), -600, np.int16), KIND, 2.5, "CT")
    head = [f"POST {path} HTTP/1.1", "Host: bench", f"X-Site: {os.environ['BENCH_SITE']}",
            f"Content-Type: {KIND}", f"Content-Length: {len(body)}"]  # fmt: skip
    request = "\r\n".join([*head, "", ""]).encode() + body
    asyncio.run(load(port, request, load_for[0], 0.5))
    before = _cpu_seconds(process)
    spent = asyncio.run(load(port, request, *load_for))
    cpu_ms = 1000 * (_cpu_seconds(process) - before) / len(spent)
    middle, last = np.percentile(spent, [50, 99]).round(2).tolist()
    return {
        "requests_per_s": round(len(spent) / load_for[1], 1),
        "p50_ms": middle,
        "p99_ms": last,
        "server_cpu_ms": round(cpu_ms, 3),
    }


def _cpu_seconds(process: psutil.Process) -> float:
    family = [process, *process.children(recursive=True)]
    return sum(times.user + times.system for times in (member.cpu_times() for member in family))


def start(command: list[str], port: int, path: str, **settings: str) -> psutil.Process:
    """A server on loopback, once it answers."""
    process = psutil.Popen(command, env={**os.environ, **SETTINGS, **settings},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    for _ in range(300):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200:
                return process
        time.sleep(0.2)
    raise SystemExit(f"{' '.join(command)} did not answer")


def copy_var(var: Path, folder: Path) -> None:
    """The ledger and the packages of a var folder, and a journal of its own."""
    with sqlite3.connect(var / "formulary.db") as ledger:
        ledger.execute("VACUUM INTO ?", (str(folder / "formulary.db"),))
    (folder / "packages").symlink_to((var / "packages").resolve())


def compare(package: Path, scratch: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Both servers in turns; the median of the rounds."""
    ports = {"peer": free_port(), "gateway": free_port()}
    commands = {
        "peer": [sys.executable, __file__, "--peer", str(package), str(ports["peer"])],
        "gateway": [sys.executable, "-m", "formulary", "services", "serve", "--port", str(ports["gateway"])],
    }
    paths = {"peer": "/predict", "gateway": f"/v1/models/{TASK}/predict"}
    ready = {"peer": "/openapi.json", "gateway": "/readyz"}
    servers = {
        name: start(commands[name], ports[name], ready[name], FORMULARY_VAR=str(scratch)) for name in ports
    }
    told: dict[str, Any] = {"engine": measure_engine(package, seconds)}
    try:
        for clients in (1, CLIENTS):
            found = {name: [] for name in servers}
            for _ in range(rounds):
                for name, process in servers.items():
                    found[name].append(measure_server(process, ports[name], paths[name], (clients, seconds)))
            told[f"clients_{clients}"] = {
                name: {key: float(np.median([row[key] for row in rows])) for key in rows[0]}
                for name, rows in found.items()
            }
    finally:
        for process in servers.values():
            process.terminate()
            process.wait(30)
    return told


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="about a minute: 3 rounds of 3 s instead of 7 of 10 s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument(
        "--peer", nargs=2, metavar=("PACKAGE", "PORT"), help="be the peer (used by this script)"
    )
    asked = parser.parse_args()
    if asked.peer:
        return serve_peer(Path(asked.peer[0]), int(asked.peer[1]))
    places = read_places()
    champions = open_ledger(places.var).champions(TASK)
    if not champions:
        raise SystemExit(f"No version of {TASK} is approved anywhere. Run `make demo` first.")
    os.environ["BENCH_SITE"], champion = next(iter(champions.items()))
    with tempfile.TemporaryDirectory() as folder:
        copy_var(places.var, Path(folder))
        rounds, seconds = (3, 3.0) if asked.quick else (7, 10.0)
        told = compare(shelf(places.var, champion.digest), Path(folder), rounds, seconds)
    ours, peer = (told[f"clients_{CLIENTS}"][name] for name in ("gateway", "peer"))
    told["gateway_over_peer"] = round(ours["requests_per_s"] / peer["requests_per_s"], 3)
    told["gateway_over_engine"] = round(ours["requests_per_s"] / told["engine"]["batch_32"], 3)
    report(told)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")
    return None


def report(told: dict[str, Any]) -> None:
    """A table for people."""
    rows = [["engine alone", size.removeprefix("batch_") + " a batch", f"{rate:.0f}", "", "", ""]
            for size, rate in told["engine"].items()]  # fmt: skip
    for clients in (1, CLIENTS):
        for name, row in told[f"clients_{clients}"].items():
            rows.append([name, f"{clients} clients", f"{row['requests_per_s']:.0f}", f"{row['p50_ms']:.1f}",
                         f"{row['p99_ms']:.1f}", f"{row['server_cpu_ms']:.2f}"])  # fmt: skip
    print_table(
        f"{TASK}, OpenVINO f32, 1 thread", ["what", "load", "images/s", "p50 ms", "p99 ms", "CPU ms"], rows
    )
    print(
        f"gateway / peer {told['gateway_over_peer']:.2f}, gateway / engine {told['gateway_over_engine']:.2f}"
    )


if __name__ == "__main__":
    main()
