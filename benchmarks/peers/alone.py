"""The engine without a server.

`alone.py PACKAGE ENGINE` tells its answer to the payload. `... SECONDS BATCH[,BATCH...]` measures one
thread on prepared images, `... SECONDS BATCH[,BATCH...] THREADS` as many that decode each image, too.
"""

from __future__ import annotations

import json
import sys
import time
from threading import Thread

import numpy as np
import psutil
from model import Model
from packages import draw_payload


def work(model: Model, body: bytes, batch: int, until: float, spent: list[float], decodes: bool) -> None:
    image = model.decode(body)
    while (start := time.perf_counter()) < until:
        model.answer([model.decode(body) for _ in range(batch)] if decodes else [image] * batch)
        spent.append(time.perf_counter() - start)


def measure(models: list[Model], body: bytes, batch: int, seconds: float, decodes: bool) -> dict[str, float]:
    spent: list[float] = []
    start, used = time.perf_counter(), time.process_time()
    threads = [
        Thread(target=work, args=(model, body, batch, start + seconds, spent, decodes)) for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    images, took, used = batch * len(spent), time.perf_counter() - start, time.process_time() - used
    p50, p99 = np.percentile(spent, [50, 99]) * 1000
    memory = psutil.Process().memory_info().rss / 2**20
    return {
        "rps": images / took,
        "p50_ms": p50,
        "p99_ms": p99,
        "cpu_ms": 1000 * used / images,
        "rss_mb": memory,
    }


if __name__ == "__main__":
    package, engine, *how = sys.argv[1:]
    threads = int(how[2]) if len(how) > 2 else 1
    models = [Model(package, engine) for _ in range(threads)]
    body, _ = draw_payload(models[0].contract.task)
    if how:
        sizes, seconds = map(int, how[1].split(",")), float(how[0])
        print(json.dumps([measure(models, body, size, seconds, threads > 1) for size in sizes]))
    else:
        print(json.dumps(models[0].answer([models[0].decode(body)])[0]))
