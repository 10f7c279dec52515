"""The gateway as a child process, the way `formulary services serve` starts it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import psutil

from imaging.vocabulary import Modality
from services.findings import encode
from services.stack import free_port
from tests.tiny import ROOT, SIZE

NPY = "application/x-npy"


def draw_pixels(seed=0):
    """One CT slice as the tiny tasks know it, int16 (rows, columns)."""
    return np.random.default_rng(seed).normal(-600, 60, (SIZE, SIZE)).astype(np.int16)


class Gateway:
    """A gateway on loopback; `with` starts it and ends it, by process id."""

    def __init__(self, places, *arguments, trust=None, **environment):
        self.places, self.port = places, free_port()
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "FORMULARY_ROOT": str(places.root),
            "FORMULARY_VAR": str(places.var), "OMP_NUM_THREADS": "1", **environment,
        }  # fmt: skip
        self.environment.pop("FORMULARY_BUILD", None)
        self.log = places.var / f"gateway-{self.port}.log"
        self._command = ["services", "serve", "--port", str(self.port), *arguments]
        scheme = "https" if trust else "http"
        self.client = httpx.Client(
            base_url=f"{scheme}://127.0.0.1:{self.port}", timeout=60, verify=trust or True
        )

    def __enter__(self):
        places_of_work = self.places.root
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "formulary", *self._command],
                cwd=places_of_work, env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.client.get("/livez").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.1)
        self.kill()
        raise AssertionError(f"the gateway did not start:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_):
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(timeout=30)
        finally:
            self.kill()

    def signal(self, number):
        """Send a signal to every process at once: BentoML's supervisor, and the worker that answers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def kill(self):
        """kill -9 of every process."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def post(self, task="nodes", body=None, kind=NPY, site="north", **headers):
        """Ask for one image; None leaves a header out."""
        body = encode(draw_pixels(), NPY, 2.0, Modality.CT) if body is None else body
        given = {"Content-Type": kind, "X-Site": site, **headers}
        given = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
        return self.client.post(f"/v1/models/{task}/predict", content=body, headers=given)

    def make_link(self, identity):
        """What `formulary services login` prints."""
        command = [sys.executable, "-m", "formulary", "services", "login", identity, "--port", str(self.port)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def count(self, metric, **labels):
        """The value of one sample of /metrics, 0 when it is not there."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return sum(s.value for s in samples if s.name == metric and labels.items() <= s.labels.items())

    def wait(self, condition, seconds=60):
        """Until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def errors(self):
        """Lines of the log that tell of a fault of ours."""
        return [line for line in self.log.read_text().splitlines() if re.search(r"Traceback|CRITICAL", line)]
