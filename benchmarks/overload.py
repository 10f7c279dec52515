"""How the gateway bears it: start, idle memory, and five times the clients of its best throughput.

The small network, OpenVINO bf16, with journal, metrics and access control. First the number of clients with
the most answers a second is looked for; then five times as many ask. Who is refused (429) comes back after a
second, as Retry-After says. Goodput is answers a second of the crowd over those at the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe_machine
from packages import SMALL, make_root
from servers import Server, describe_ours

from imaging.terminal import print_table

CROWDS = (8, 16, 32, 48)
TIMES = 5


def measure_start(stack: Any, folder: Path) -> dict[str, float]:
    """Seconds until ready, and MB at rest ten seconds later, of a second start."""
    for turn in ("cold", "warm"):
        begun = time.perf_counter()
        server = Server(stack, folder / f"start-{turn}.log")
        try:
            server.wait()
            ready_s = time.perf_counter() - begun
            family = server._family()
            rss_mb = sum(one.memory_info().rss for one in family) / 2**20
            worker_mb = max(one.memory_info().rss for one in family) / 2**20
        finally:
            server.stop()
    return {"ready_s": round(ready_s, 2), "idle_rss_mb": round(rss_mb), "worker_rss_mb": round(worker_mb)}


def measure_crowds(stack: Any, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """The peak, and what is left of it with five times the clients; medians of the rounds."""
    server = Server(stack, folder / "overload.log")
    try:
        server.wait()
        rows: dict[int, list[dict[str, float]]] = {clients: [] for clients in CROWDS}
        for _ in range(rounds):
            for clients, found in rows.items():
                found.append(server.measure(clients, seconds))
        best = max(rows, key=lambda clients: middle(rows[clients], "rps"))
        crowd, peak = [], []
        for _ in range(rounds):
            peak.append(server.measure(best, seconds))
            crowd.append(server.measure(TIMES * best, seconds))
    finally:
        server.stop()
    told = {name: {key: middle(found, key) for key in ("rps", "p50_ms", "p99_ms", "refused")}
            for name, found in (("peak", peak), ("crowd", crowd))}  # fmt: skip
    return {"clients": best, **told, "goodput": round(told["crowd"]["rps"] / told["peak"]["rps"], 3),
            "p99_ratio": round(told["crowd"]["p99_ms"] / told["peak"]["p99_ms"], 3)}  # fmt: skip


def middle(rows: list[dict[str, float]], key: str) -> float:
    """The median of the rounds."""
    return round(sorted(row[key] for row in rows)[len(rows) // 2], 2)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds of 3 s instead of 5 of 8 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    asked = parser.parse_args()
    rounds, seconds = (3, 3.0) if asked.quick else (5, 8.0)
    with tempfile.TemporaryDirectory() as folder:
        places = make_root(Path(folder) / "root", SMALL)
        stack = describe_ours(places, SMALL, "openvino/bf16", {})
        told = {"start": measure_start(stack, Path(folder)),
                **measure_crowds(stack, Path(folder), rounds, seconds),
                "machine": describe_machine(Path(folder)), "cores": psutil.cpu_count()}  # fmt: skip
    rows = [[f"{times} x {told['clients']} clients",
             *(f"{told[name][key]:.1f}" for key in ("rps", "p50_ms", "p99_ms", "refused"))]
            for name, times in (("peak", 1), ("crowd", TIMES))]  # fmt: skip
    print_table("small CNN, OpenVINO bf16", ["load", "answers/s", "p50 ms", "p99 ms", "refused"], rows)
    print(f"goodput {told['goodput']:.2f} of the peak, p99 {told['p99_ratio']:.2f} times; ready in "
          f"{told['start']['ready_s']:.1f} s, {told['start']['idle_rss_mb']} MB at rest")  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
