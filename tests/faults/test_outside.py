"""No URL is fetched, whatever names it, and serving knows no MLflow: the gateway opens no connection."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from imaging.config import Places
from imaging.vocabulary import ContentType, Modality
from registry.actions import ACTIONS
from services.findings import encode
from tests.debian import need
from tests.faults.conftest import copy
from tests.tiny import ROOT, promote
from tests.tiny_gateway import NPY, Gateway, draw_pixels

TRIES = 10_000 if os.environ.get("FORMULARY_SOAK") else 400
CLIENTS = 16
HOOK = """
import os, sys

LOG = os.open(os.environ["AUDIT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
LOOKED_UP = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto")
USED = ("open", "os.listdir", "os.scandir", "sqlite3.connect")


def note(event, told):
    ours = told and told[0] in ("127.0.0.1", os.uname().nodename)  # where the server listens
    goes_out = (event in LOOKED_UP and not ours) or (event == "socket.connect" and isinstance(told[1], tuple))
    if goes_out or (event in USED and "/mlflow/" in f"{told[0]}/"):
        os.write(LOG, f"{event} {told}\\n".encode())


sys.addaudithook(note)
"""


class Wire(http.client.HTTPConnection):
    """A client that counts the connections that it opens."""

    opened = 0

    def connect(self):
        Wire.opened += 1
        super().connect()


class Listener:
    """A port on loopback; `heard` counts who called."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port, self.heard = self._socket.getsockname()[1], 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            connection, _ = self._socket.accept()
            self.heard += 1
            connection.close()


def name_urls(port):
    """What somebody might be talked into asking: a port of ours, a cloud's own address, a name, a file."""
    hosts = (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", f"0x7f000001:{port}",
             "169.254.169.254/latest/meta-data", "metadata.google.internal")  # fmt: skip
    named = [f"{scheme}://{host}/" for host in hosts for scheme in ("http", "https", "ftp")]
    return [*named, f"//127.0.0.1:{port}/", f"\\\\127.0.0.1@{port}\\a", "file:///etc/passwd", "s3://bucket/"]


def write_try(number, url, token):
    """A request that names the URL in every field that it has: method, path, body and headers."""
    action, told = list(ACTIONS.values())[number % len(ACTIONS)], quote(url, safe="")
    names = [*action.arguments.model_fields, "url", "$ref", "$schema"]
    form = f'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n{url}\r\n--b--\r\n'
    seen = "GET" if action.reads else "POST"
    paths = [
        ("POST", "/v1/models/nodes/predict"), ("POST", f"/v1/models/nodes/predict?heat=1&url={told}"),
        ("POST", f"/v1/models/{told}/predict"), ("POST", "/v1/models/discs/volumes"),
        ("POST", f"/v1/models/nodes/explanations?method={told}"), ("GET", f"/v1/jobs/{told}/result"),
        ("GET", f"/docs?url={told}"), ("GET", url.replace("\\", "/")), ("PUT", f"/{told}"),
        (seen, f"/v1/registry/{action.name}?" + "&".join(f"{quote(name)}={told}" for name in names)),
    ]  # fmt: skip
    kinds = [*ContentType, "application/json", "text/uri-list", "multipart/form-data; boundary=b", url]
    bodies = [url, json.dumps({"image": url, "url": [url]}), form, json.dumps(dict.fromkeys(names, url))]
    named = ("X-Subject", "X-Study", "X-Request-ID", "Referer", "Origin", "Forwarded", "From", "Cookie",
             "X-Forwarded-Host", "Content-Location", "Link", "traceparent")  # fmt: skip
    headers = dict.fromkeys(named, url)
    headers |= {"X-Site": url if number % 11 == 0 else "north", "Accept": url if number % 7 == 0 else "*/*",
                "Content-Type": kinds[number % len(kinds)], "Authorization": f"Bearer {token}"}  # fmt: skip
    method, path = paths[number % len(paths)]
    return method, path, bodies[3 if "registry" in path else number % 3].encode(), headers


def ask_everything(port, urls, token):
    """Send TRIES requests from CLIENTS clients at once; the statuses, None where a request was cut off."""
    told = []

    def ask(client):
        wire = Wire("127.0.0.1", port, timeout=60)
        for number in range(client, TRIES, CLIENTS):
            try:
                wire.request(*write_try(number, urls[number % len(urls)], token))
                answer = wire.getresponse()
                answer.read()
                told.append(answer.status)
            except (ConnectionError, http.client.HTTPException):
                wire.close()
                told.append(None)
        wire.close()

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


@pytest.fixture
def audit(tmp_path):
    """The environment of a process that writes down where it connects, whom it looks up, and any MLflow."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "audit.log"
    log.touch()
    return log, {"PYTHONPATH": f"{tmp_path / 'hook'}{os.pathsep}{ROOT}", "AUDIT": str(log)}


def test_the_audit_writes_down_what_goes_out(audit):
    log, environment = audit
    listener = Listener()
    asks = f"""import urllib.request
try: urllib.request.urlopen('http://localhost:{listener.port}')
finally: open('/nowhere/mlflow/mlflow.db')"""
    subprocess.run([sys.executable, "-c", asks], env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    assert listener.heard == 1
    noted = {line.split()[0] for line in log.read_text().splitlines()}
    assert {"socket.getaddrinfo", "socket.connect", "open"} <= noted


def test_no_url_in_any_field_is_fetched(apart, token, audit):
    (log, environment), listener = audit, Listener()
    with Gateway(apart, **environment) as gateway:
        told = ask_everything(gateway.port, name_urls(listener.port), token)
        assert len(told) == TRIES
        assert max(status for status in told if status) < 500
        assert gateway.post().status_code == 200
        assert not gateway.errors()
    assert log.read_text() == ""
    assert listener.heard == 0


def count_sent():
    """TCP connections that were asked for and UDP packets that were sent in this network namespace."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines()]
    told = {(names[0], name): int(value) for names, values in zip(lines[::2], lines[1::2], strict=True)
            for name, value in zip(names[1:], values[1:], strict=True)}  # fmt: skip
    six = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return told["Tcp:", "ActiveOpens"], told["Udp:", "OutDatagrams"] + int(six["Udp6OutDatagrams"])


def try_inside(root, token):
    """In a network of its own where every address is this machine: prints what the kernel counted."""
    root, listener = Path(root), Listener()
    with Gateway(Places(root=root, build=root / "build", var=root / "var")) as gateway:
        opened, sent = count_sent()
        told = ask_everything(gateway.port, name_urls(listener.port), token)
        after = count_sent()
        assert not gateway.errors()
    with contextlib.suppress(OSError):
        socket.create_connection(("169.254.169.254", 80))
    control = count_sent()[0] - after[0]
    print(json.dumps({"tries": len(told), "heard": listener.heard, "datagrams": after[1] - sent,
                      "connections": after[0] - opened - Wire.opened, "control": control}))  # fmt: skip


INSIDE = ("ip link set lo up; ip route add local 0.0.0.0/0 dev lo; ip -6 route add local ::/0 dev lo; "
          'exec "$0" -m tests.faults.test_outside "$@"')  # fmt: skip


def test_the_kernel_counts_no_packet_that_leaves(apart, token):
    need("iproute2", shutil.which("ip"))
    alone = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a network namespace")
    command = [*alone, "sh", "-c", INSIDE, sys.executable, str(apart.root), token]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told.pop("control") > 0  # it does count
    assert told == {"tries": TRIES, "heard": 0, "datagrams": 0, "connections": 0}


def test_serving_and_loading_a_new_version_touch_no_mlflow(early, token, tmp_path, audit):
    """What an MLflow server that is killed could take away is nothing: it is never asked, nor its files."""
    (log, environment), listener = audit, Listener()
    places = copy(early, tmp_path)
    environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{listener.port}"
    (places.var / "mlflow").mkdir(exist_ok=True)
    with Gateway(places, **environment) as gateway:
        assert gateway.post("discs").status_code == 200
        assert gateway.post("nodes").json()["type"] == "/problems/not-approved"
        promote(places, "nodes", 1)
        gateway.wait(lambda: gateway.post("nodes").status_code == 200)
        body = encode(draw_pixels(), NPY, 2.0, Modality.CT)
        asked = {"X-Site": "north", "Content-Type": NPY}
        place = gateway.client.post("/v1/models/nodes/explanations", content=body, headers=asked)
        place = place.headers["location"]
        gateway.wait(lambda: gateway.client.get(place, headers=asked).json()["state"] == "done", 60)
        assert gateway.client.get("/metrics").status_code == 200
        assert not gateway.errors()
    assert log.read_text() == ""
    assert listener.heard == 0


if __name__ == "__main__":
    try_inside(*sys.argv[1:])
