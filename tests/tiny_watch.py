"""Prometheus, Alertmanager and somebody who is told, all real and all on loopback."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import yaml

from services.stack import free_port
from tests.tiny import ROOT


class Receiver:
    """Keeps what Alertmanager sends, as (receiver, alert)."""

    def __enter__(self):
        told = self.told = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.extend((self.path.strip("/"), alert) for alert in sent["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def has(self, alertname, status="firing", **labels):
        """The receivers that were told of an alert."""
        wanted = {"alertname": alertname, **labels}.items()
        return {to for to, one in self.told if one["status"] == status and wanted <= one["labels"].items()}


class Watchers:
    """Both programs as `formulary monitoring` starts them, looking every second; `with` ends them."""

    def __init__(self, places, gateway, receiver):
        self.places, self.port, self.alerts = places, free_port(), free_port()
        config = yaml.safe_load((ROOT / "deploy/alertmanager/alertmanager.yml").read_text())
        config["route"] |= {"group_wait": "0s", "group_interval": "1s"}
        for one in config["receivers"]:
            one["webhook_configs"] = [{"url": f"{receiver.address}/{one['name']}", "send_resolved": True}]
        path = places.var / "told.yml"
        path.write_text(yaml.safe_dump(config))
        self._environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "FORMULARY_ROOT": str(places.root),
            "FORMULARY_VAR": str(places.var), "GATEWAY_PORT": str(gateway),
            "ALERTMANAGER_PORT": str(self.alerts), "ALERTMANAGER_CONFIG": str(path),
        }  # fmt: skip
        self.children = []

    def __enter__(self):
        self._start("alertmanager", "--port", str(self.alerts))
        self._start("prometheus", "--port", str(self.port), "--interval", "1")
        for port in (self.alerts, self.port):
            self.wait(lambda port=port: self._is_ready(port), 30)
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.terminate()
        for child in self.children:
            child.wait(timeout=20)

    def _start(self, name, *arguments):
        with (self.places.var / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", "formulary", "monitoring", name, *arguments]
            self.children.append(subprocess.Popen(command, cwd=self.places.root, env=self._environment,
                                                  stdout=log, stderr=subprocess.STDOUT))  # fmt: skip

    def _is_ready(self, port):
        try:
            return httpx.get(f"http://127.0.0.1:{port}/-/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, query):
        """What Prometheus answers to a query: samples; an error is an error."""
        told = httpx.get(
            f"http://127.0.0.1:{self.port}/api/v1/query", params={"query": query}, timeout=10
        ).json()
        assert told["status"] == "success", f"{query}: {told}"
        return told["data"]["result"]

    def wait(self, condition, seconds):
        """Until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "".join((self.places.var / f"{name}.log").read_text()[-2000:]
                           for name in ("prometheus", "alertmanager")
                           if (self.places.var / f"{name}.log").exists())  # fmt: skip
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{logs}"
            time.sleep(0.1)
