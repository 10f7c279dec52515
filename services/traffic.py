"""A client that sends a site's images and keeps what came back: the demo's hospitals."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imaging.recipe import TaskSection
from services.findings import encode, lossless_types

CLIENTS = 4


@dataclass
class Answered:
    """What one site got back.

    Attributes:
        latencies_ms: of each answer, as the client saw it.
        answers: how many were 200.
        refusals: detail -> how many times.
        problems: names of the problems that the refusals were, e.g. not-approved.
        version: that answered last.
    """

    latencies_ms: list[float] = field(default_factory=list)
    answers: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    problems: set[str] = field(default_factory=set)
    version: int | None = None

    def percentile(self, share: float) -> float | None:
        """A percentile of the latencies in ms, or None without answers."""
        return round(float(np.percentile(self.latencies_ms, share)), 2) if self.latencies_ms else None


def send_traffic(
    address: str, asked: tuple[str, TaskSection], folder: Path, advance: Any
) -> dict[str, Answered]:
    """Send every image of a traffic folder, each site's in order, as the content types that hospitals use.

    Args:
        address: of the gateway.
        asked: the task, and its section of params.yaml.
        folder: what `formulary training traffic` wrote.
        advance: called once an answer, for the progress bar.

    Returns:
        Site -> what it got.
    """
    import httpx
    import pandas as pd

    table = pd.read_parquet(folder / "traffic.parquet")
    pixels = np.load(folder / "traffic.npy", mmap_mode="r")
    task, section = asked
    found = {str(site): Answered() for site in table["site"].unique()}
    with httpx.Client(base_url=address, timeout=30) as client, ThreadPoolExecutor(CLIENTS) as pool:

        def send(site: str) -> None:
            rows = table.index[table["site"] == site]
            for number, row in enumerate(rows):
                facts = table.loc[row]
                _send(
                    client,
                    task,
                    (site, str(facts["subject"])),
                    _encode(pixels[row], (facts, section), number),
                    found[site],
                )
                advance()

        list(pool.map(send, found))
    return found


def _encode(pixels: Any, about: tuple[Any, TaskSection], number: int) -> tuple[bytes, str]:
    kinds = lossless_types(pixels)
    kind = kinds[number % len(kinds)]
    facts, section = about
    offset = section.package.png_offset
    return encode(pixels, kind, float(facts["spacing_mm"]), section.modality, offset), kind


def _send(client: Any, task: str, who: tuple[str, str], body: tuple[bytes, str], kept: Answered) -> None:
    headers = {"X-Site": who[0], "X-Subject": who[1], "Content-Type": body[1]}
    start = time.perf_counter()
    answer = client.post(f"/v1/models/{task}/predict", content=body[0], headers=headers)
    spent = 1000 * (time.perf_counter() - start)
    told = answer.json()
    if answer.status_code == 200:
        kept.answers += 1
        kept.latencies_ms.append(spent)
        kept.version = int(told["version"])
    else:
        kept.refusals[told["detail"]] = kept.refusals.get(told["detail"], 0) + 1
        kept.problems.add(told["type"].removeprefix("/problems/"))
