"""Ours and what a team would pick instead, on the same model file, payload and clients, in one run.

For each model and engine the servers are started once and take turns: all but the one that is asked are held
still (SIGSTOP), and of all rounds the median counts, so that a machine whose speed drifts is fair to all.
Each has one engine thread, batches as much as it can by itself, and has the settings that its documentation
names for speed. Ours asks for a key, journals durably before each 200, and keeps its metrics. What does not
start, or answers otherwise than the engine, is told as such. Needs no version of its own: peers/packages.py.

JSON: `rows` of {stack, model, engine, clients, rps, p50_ms, p99_ms, cpu_ms, rss_mb}, medians of the rounds.
cpu_ms is the CPU time of all of a server's processes for an answer, rss_mb their resident memory, added up.
The stack `engine` is the engine alone in a process, on prepared images; its clients are images of a batch.
`failed`: {stack, model, engine, why}. `both_cores`: DenseNet121 with FORMULARY_LANES=2, and what two threads
that decode and run an engine do without a server. Also `refused`, `starts_s`, `client`, `machine`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe_machine
from packages import DENSE, SMALL, make_root
from servers import NULL, Failed, Server, Stack, describe_ours, list_stacks, measure_alone

from imaging.config import Places
from imaging.terminal import print_table

COLUMNS = ((SMALL, "torch/f32"), (SMALL, "openvino/bf16"), (DENSE, "openvino/bf16"))
CLIENTS, BATCHES = (1, 8, 32), (1, 4, 16)
KEPT = ("rps", "p50_ms", "p99_ms", "cpu_ms", "rss_mb")
MARKS = ("<!-- figures: benchmarks/serving.py --page -->", "<!-- end of figures -->")
Rows = list[dict[str, Any]]


class Comparison:
    """One model on one engine, in each stack.

    Args:
        places: a checkout with a version of it.
        column: model and engine.
        how: rounds, and seconds of each measurement.
        told: where findings go.
    """

    def __init__(
        self, places: Places, column: tuple[str, str], how: tuple[int, float], told: dict[str, Any]
    ) -> None:
        self._places, self._column, self._how, self._told = places, column, how, told
        self._facts = {"model": column[0], "engine": column[1]}

    def compare(self, asked: list[str]) -> None:
        """Every stack, or those that are asked for, in turns."""
        found: dict[tuple[str, int], Rows] = {}
        stacks = list_stacks(self._places, *self._column)
        with self._serve([one for one in stacks if one.name in (asked or [one.name])]) as servers:
            for number in range(self._how[0]):
                print(f"{' with '.join(self._column)}: round {number + 1}", file=sys.stderr)
                for clients, row in zip(CLIENTS, self._measure_alone(CLIENTS), strict=True):
                    found.setdefault(("engine", clients), []).append(row)
                for server in list(servers):
                    self._measure(servers, server, found)
        for (stack, clients), rows in found.items():
            row = {"stack": stack, **self._facts, "clients": clients}
            self._told["rows"].append(row | take_medians(rows))
            if refused := sum(one.get("refused", 0) for one in rows):
                self._told["refused"].append(row | {"refused": refused})

    def compare_both_cores(self) -> dict[str, Any]:
        """Ours with two batches in flight, and two threads that decode and run an engine, and serve nobody.

        The threads try several sizes of a batch, and the fastest counts.
        """
        ours, alone = Rows(), [Rows() for _ in BATCHES]
        stack = describe_ours(self._places, *self._column, {"FORMULARY_LANES": "2"})
        with self._serve([stack]) as servers:
            for _ in range(self._how[0]):
                for server in list(servers):
                    with self._noting(servers, server):
                        ours.append(server.measure(CLIENTS[-1], self._how[1]))
                for rows, row in zip(alone, self._measure_alone(BATCHES, "2"), strict=True):
                    rows.append(row)
        if not ours:
            return {}
        served, best = take_medians(ours), max(map(take_medians, alone), key=lambda row: row["rps"])
        return {"formulary": served, "alone": best, "ratio": round(served["rps"] / best["rps"], 3)}

    def _measure(self, servers: list[Server], server: Server, found: dict[tuple[str, int], Rows]) -> None:
        with self._noting(servers, server):
            for clients in CLIENTS:
                row = server.measure(clients, self._how[1])
                found.setdefault((server.stack.name, clients), []).append(row)

    def _measure_alone(self, batches: tuple[int, ...], *threads: str) -> Rows:
        package, sizes = self._places.stage(self._column[0], "package"), ",".join(map(str, batches))
        told: Rows = measure_alone(package, self._column[1], str(self._how[1]), sizes, *threads)
        return told

    @contextmanager
    def _serve(self, stacks: list[Stack]) -> Iterator[list[Server]]:
        """Servers that answer as the engine does, held still, and ended whatever happens."""
        model, engine = self._column
        expected, servers = measure_alone(self._places.stage(model, "package"), engine), list[Server]()
        try:
            for stack in stacks:
                log = self._places.root.with_name(f"{stack.name} {model}.log".replace(" ", "-"))
                servers.append(server := Server(stack, log))
                with self._noting(servers, server):
                    server.wait()
                    server.check(expected)
                    self._told["starts_s"].append({"stack": stack.name, **self._facts, "s": server.start_s})
            yield servers
        finally:
            for server in servers:
                server.stop()

    @contextmanager
    def _noting(self, servers: list[Server], server: Server) -> Iterator[None]:
        """A server that fails is told of, ended, and asked no more."""
        try:
            yield
        except Failed as error:
            servers.remove(server)
            server.stop()
            self._told["failed"].append({"stack": server.stack.name, **self._facts, "why": str(error)})
            print(f"{server.stack.name} on {' with '.join(self._column)}: {error}", file=sys.stderr)


def take_medians(rows: Rows) -> dict[str, float]:
    return {name: round(float(np.median([row[name] for row in rows])), 3) for name in KEPT}


def measure_clients(folder: Path, seconds: float) -> dict[str, float]:
    """What the clients can ask of a server that does nothing, on the same cores."""
    server = Server(NULL, folder / "null.log")
    try:
        server.wait()
        told = server.measure(CLIENTS[-1], seconds)
    finally:
        server.stop()
    return {"most_rps": round(told["rps"]), "cpu_ms": round(told["client_cpu_ms"], 3)}


def report(told: dict[str, Any]) -> None:
    """A table for people, of each model and engine."""
    for model, engine in COLUMNS:
        this = {"model": model, "engine": engine}
        rows = [[row["stack"], str(row["clients"]), f"{row['rps']:.0f}",
                 *(f"{row[name]:.2f}" for name in KEPT[1:4]), f"{row['rss_mb']:.0f}"]
                for row in told["rows"] if this.items() <= row.items()]  # fmt: skip
        rows += [[row["stack"], "", "FAILED", row["why"][:60], "", "", ""]
                 for row in told["failed"] if this.items() <= row.items()]  # fmt: skip
        names = ["stack", "clients", "answers/s", "p50 ms", "p99 ms", "CPU ms", "MB"]
        print_table(f"{model}, {engine}", names, rows)
    print("DenseNet121 on both cores:", json.dumps(told["both_cores"]))
    print("the clients alone:", json.dumps(told["client"]), "on", json.dumps(told["machine"]))


def write_page(told: dict[str, Any], path: Path) -> None:
    """The figures as Markdown, in place of what stands between the page's two marks."""
    lines = ["Machine: " + json.dumps(told["machine"]), ""]
    for clients in CLIENTS:
        lines += [f"{clients} client{'s' * (clients > 1)}", ""]
        lines += ["| | " + " | ".join(", ".join(column) for column in COLUMNS) + " |", "|---" * 4 + "|"]
        rows = {(row["stack"], row["model"], row["engine"]): row for row in told["rows"]
                if row["clients"] == clients}  # fmt: skip
        for stack in dict.fromkeys(row["stack"] for row in told["rows"] + told["failed"]):
            cells = (_show(rows.get((stack, *column))) for column in COLUMNS)
            lines.append(f"| {stack} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        f"{one['stack']} failed on {one['model']}, {one['engine']}: {one['why']}" for one in told["failed"]
    ]
    lines += ["DenseNet121 on both cores: " + json.dumps(told["both_cores"]), ""]
    lines += ["The clients alone, of a server that does nothing: " + json.dumps(told["client"])]
    before, _, rest = path.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    path.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + after]))


def _show(row: dict[str, Any] | None) -> str:
    if row is None:
        return "failed"
    return "{rps:.0f}; {p50_ms:.1f}, {p99_ms:.1f}; {cpu_ms:.2f}; {rss_mb:.0f}".format(**row)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds of 0.7 s instead of 5 of 3 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--stack", action="append", default=[], help="only this one; may be given again")
    parser.add_argument("--page", type=Path, metavar="FILE", help="renew the figures of docs/performance.md")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or servers that are held still would stay
    how = (2, 0.7) if asked.quick else (5, 3.0)
    told: dict[str, Any] = {"rows": [], "failed": [], "refused": [], "starts_s": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        told["machine"] = describe_machine(folder)
        told["client"] = measure_clients(folder, how[1])
        roots = {model: make_root(folder / model, model) for model in (SMALL, DENSE)}
        comparisons = [Comparison(roots[column[0]], column, how, told) for column in COLUMNS]
        for comparison in comparisons:
            comparison.compare(asked.stack)
        told["both_cores"] = comparisons[-1].compare_both_cores()
    report(told)
    if asked.page:
        write_page(told, asked.page)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
