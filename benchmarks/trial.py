"""What a silent trial costs live traffic: latency with and without one, in turns, on the real gateway.

The challenger is larger than the champion, so that it always has something to do. Turns alternate within one
run, since other work on the machine moves both alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from imaging.vocabulary import Kind, Modality
from registry.access import Acting, admit
from registry.ledger import open_ledger
from registry.trials.conduct import end_trial, start_trial
from registry.trials.plan import Plan
from registry.trials.rows import open_rows
from services.findings import encode
from tests.tiny import promote, train, write_root
from tests.tiny_gateway import NPY, Gateway, draw_pixels

CLIENTS, SUBJECTS = 4, 200  # too few subjects for a verdict: the trial goes on
PAUSE_S = 0.004  # of a client between two requests, so that the gateway is not saturated
PLAN = Plan(size=2000, margin=0.01)


def make_checkout(folder: Path):
    """The task `nodes`: version 1 serves at north, version 2 is six times as wide."""
    places = write_root(folder, nodes=Kind.CLASSIFICATION)
    promote(places, "nodes", train(places, "nodes"))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["tasks"]["nodes"]["fit"]["architecture"]["channels"] = [24, 48]
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    train(places, "nodes")
    return places


def ask(gateway: Gateway, seconds: float) -> list[float]:
    """Milliseconds of every request that some clients send within a time."""
    spent: list[float] = []
    body, end = encode(draw_pixels(), NPY, 2.0, Modality.CT), time.perf_counter() + seconds

    def send(client: int) -> None:
        rng = np.random.default_rng(client)
        with httpx.Client(base_url=f"http://127.0.0.1:{gateway.port}") as http:
            while time.perf_counter() < end:
                headers = {"Content-Type": NPY, "X-Site": "north", "X-Subject": str(rng.integers(SUBJECTS))}
                start = time.perf_counter()
                http.post("/v1/models/nodes/predict", content=body, headers=headers).raise_for_status()
                spent.append(1000 * (time.perf_counter() - start))
                time.sleep(PAUSE_S)

    threads = [threading.Thread(target=send, args=(client,)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return spent


def measure(places, turns: int, seconds: float) -> list[dict[str, float | str]]:
    """Latency in turns: silence, trial, silence, trial, ..."""
    ledger, spent = open_ledger(places.var), {"without": [], "with": []}
    acting = Acting(places, ledger, admit(places.var, ledger, "author@test"), "A benchmark.")
    shown = 0
    with Gateway(places) as gateway:
        ask(gateway, 2)
        for _ in range(turns):
            spent["without"] += ask(gateway, seconds)
            event, _ = start_trial(acting, "nodes", 2, PLAN, ("north",))
            while not open_rows(places.var).read(event.seq):
                ask(gateway, 0.5)
            spent["with"] += ask(gateway, seconds)
            _, told = end_trial(acting, "nodes")
            shown += told["cases"]
            time.sleep(3)  # until its process is gone
    return [{"trial": name, "requests": len(one), "p50_ms": float(np.percentile(one, 50)),
             "p99_ms": float(np.percentile(one, 99)), "shown": shown if name == "with" else 0}
            for name, one in spent.items()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute: two short turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(make_checkout(Path(folder)), *((2, 3.0) if asked.quick else (10, 10.0)))
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows}) + "\n")
    for row in rows:
        print(f"{row['trial']:>8} a trial: {row['requests']} requests, median {row['p50_ms']:.2f} ms, "
              f"99th percentile {row['p99_ms']:.2f} ms, {row['shown']} cases shown")  # fmt: skip


if __name__ == "__main__":
    main()
