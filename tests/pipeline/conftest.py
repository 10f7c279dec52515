"""A checkout of its own, small enough to run whole: the demo runs once, tests look at what it left."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SUBJECTS = 60  # sent by each site; one scanner changes in the middle of them
TINY = {"cohort": {"profile": "tiny"}, "split": {"train": 0.3, "validation": 0.5},
        "check": {"subjects_per_split_and_site": 1}, "fit": {"epochs": 2, "threads": 1},
        "package": {"golden": 4}, "reference": {"window": 50, "repeats": 20}}  # fmt: skip
COSTLY = {"robustness": {"subjects": 8, "severities": [3]}, "explanation": {"images": 30}}


class Checkout:
    """A copy of the working tree with tiny parameters and policies that a tiny model can meet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.var = root / "var"
        self.environment = {
            **os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200",
        }  # fmt: skip
        for name in (
            "FORMULARY_ROOT",
            "FORMULARY_VAR",
            "FORMULARY_BUILD",
            "MLFLOW_TRACKING_URI",
            "MLFLOW_REGISTRY_URI",
        ):
            self.environment.pop(name, None)

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout."""
        done = subprocess.run(command, cwd=self.root, env={**self.environment, **environment}, text=True,
                              capture_output=True, check=False)  # fmt: skip
        if check and done.returncode:
            logs = [log.read_text()[-4000:] for log in sorted((self.var / "log").glob("repro-*.log"))]
            raise AssertionError("\n".join([str(command), done.stdout[-4000:], done.stderr[-4000:], *logs]))
        return done

    def formulary(self, *arguments: str, check: bool = True, **environment: str):
        """Run `formulary ...` of this checkout."""
        return self.run(sys.executable, "-m", "formulary", *arguments, check=check, **environment)

    def edit_params(self, change) -> None:
        """Load params.yaml, let `change` alter it, write it back."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        change(params)
        path.write_text(yaml.safe_dump(params, sort_keys=False))


def copy_tree(target: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    ):
        if name and (ROOT / name).is_file() and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def shrink(params) -> None:
    params["profiles"]["tiny"]["internal"] = 60
    for task in params["tasks"].values():
        for section, values in TINY.items():
            task[section].update(values)
        for section in COSTLY.keys() & task["evaluate"].keys():
            task["evaluate"][section] = COSTLY[section]


def loosen(folder: Path) -> None:
    """Policies that a tiny model meets at internal sites; the external site asks for more than it can."""
    for path in folder.glob("*.yaml"):
        policy = yaml.safe_load(path.read_text())
        for where in ("network", "internal", "external"):
            low = 0.0 if where != "external" else 0.999
            margin = policy[where]["margin"]
            policy[where] = {"subjects": 1, "low": dict.fromkeys(policy[where]["low"], low), "margin": margin}
        policy["robustness"] = None
        path.write_text(yaml.safe_dump(policy))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A checkout in which `formulary demo` ran once, with few subjects."""
    root = tmp_path_factory.mktemp("checkout")
    copy_tree(root)
    checkout = Checkout(root)
    checkout.edit_params(shrink)
    loosen(root / "registry" / "policies")
    identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    checkout.run("git", "init", "-q")
    checkout.run("git", "add", "-A")
    checkout.run("git", *identity, "commit", "-q", "-m", "Start")
    checkout.output = checkout.formulary("demo", "--subjects", str(SUBJECTS)).stdout
    return checkout
