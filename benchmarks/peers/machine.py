"""What was measured on: processor, memory, disk, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "openvino", "fastapi", "uvicorn", "litserve", "bentoml", "mlflow", "ray")
FASTER = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # what half precision gains from, best first


def describe_machine(scratch: Path) -> dict[str, Any]:
    """Facts that figures depend on; the load is that of the last minute, before anything was started."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    disks = [one for one in psutil.disk_partitions(all=True) if scratch.is_relative_to(one.mountpoint)]
    return {
        "processor": told.get("model name", platform.processor()), "cores": os.cpu_count(),
        "has": [name for name in FASTER if name in told.get("flags", "").split()],
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "journal_on": max(disks, key=lambda one: len(one.mountpoint)).fstype,
        "load_before": round(os.getloadavg()[0], 2), "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }  # fmt: skip
