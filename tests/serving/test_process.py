"""What the serving process loads, and what it listens on."""

import os
import subprocess
import sys

import psutil

from tests.tiny import ROOT

HEAVY = ("mlflow", "monai", "evidently", "great_expectations", "dvc", "torch", "matplotlib", "sklearn")


def test_the_serving_process_loads_nothing_heavy(gateway, places):
    script = (
        "import sys; import services.gateway as g; from services.slots import Slots\n"
        "slots = Slots(g.PLACES); slots.start(); assert slots.table; slots.stop()\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORMULARY_ROOT": str(places.root),
                   "FORMULARY_VAR": str(places.var)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_it_listens_on_loopback_alone(gateway):
    root = psutil.Process(gateway.process.pid)
    family = [root, *root.children(recursive=True)]
    listening = {
        c.laddr for p in family for c in p.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN
    }
    assert (gateway.port) in {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_threads_do_not_exceed_what_was_set(gateway):
    root = psutil.Process(gateway.process.pid)
    environments = [p.environ() for p in [root, *root.children(recursive=True)]]
    assert {e.get("OMP_NUM_THREADS") for e in environments} == {"1"}
