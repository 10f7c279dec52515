"""Where a version comes from: commit, data, parameters and environment when it was registered."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import yaml

from imaging.config import Places, read_params
from imaging.manifest import digest_file


def describe_provenance(places: Places, task: str) -> dict[str, Any]:
    """The body of a package statement.

    Returns:
        commit ("unknown" outside git) and whether the tree differed from it; what dvc.lock says of the task's
        stages (md5 of every dependency and output); parameters; sha256 of the requirements and dvc.lock;
        Python and machine; the training history.
    """
    commit = _git(places.root, "rev-parse", "HEAD")
    changed = _git(places.root, "status", "--porcelain", "--untracked-files=no", "--", ":!dvc.lock")
    return {
        "task": task,
        "commit": commit or "unknown",
        "modified": bool(changed),
        "stages": _read_stages(places.root / "dvc.lock", task),
        "dvc_lock": _digest(places.root / "dvc.lock"),
        "environment": {"requirements": _digest(places.root / "requirements.lock"),
                        "python": platform.python_version(),
                        "machine": platform.machine()},
        "params": read_params(places).task(task).model_dump(mode="json"),
        "history": json.loads((places.stage(task, "fit") / "history.json").read_text()),
    }  # fmt: skip


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _digest(path: Path) -> str:
    return "sha256:" + digest_file(path) if path.exists() else "absent"


def _read_stages(lock: Path, task: str) -> dict[str, dict[str, str]]:
    """Stage -> path -> md5, of the stages of a task as DVC ran them."""
    if not lock.exists():
        return {}
    stages = yaml.safe_load(lock.read_text())["stages"]
    return {
        name: {
            item["path"]: item["md5"]
            for part in ("deps", "outs")
            for item in entry.get(part, [])
            if "md5" in item
        }
        for name, entry in stages.items()
        if name.endswith(f"@{task}")
    }
