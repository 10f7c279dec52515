"""The processes of the platform on one machine: which they are stands in the Procfile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from imaging.config import Places
from imaging.errors import NotReady
from monitoring.alerting import PROGRAMS, is_installed

PORTS = {"MLFLOW_PORT": 5000, "GATEWAY_PORT": 3000, "EVIDENTLY_PORT": 8000}
DEBIAN_PORTS = {"PROMETHEUS_PORT": 9090, "ALERTMANAGER_PORT": 9093}  # of programs that may be missing


def is_free(port: int) -> bool:
    """Whether a port on loopback can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_ports(ports: dict[str, int]) -> dict[str, int]:
    """The same ports, when all are free.

    Raises:
        NotReady: one is in use.
    """
    for name, port in ports.items():
        if not is_free(port):
            raise NotReady(
                f"Port {port} is in use.", f"Stop what listens there, or set {name} to another port."
            )
    return ports


def stack_environment(ports: dict[str, int]) -> dict[str, str]:
    """The environment of every process: ports, one thread each, and this installation's programs first."""
    here = str(Path(sys.executable).parent)
    return {
        **os.environ, "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}", "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1", **{name: str(port) for name, port in ports.items()},
    }  # fmt: skip


def choose_ports() -> tuple[dict[str, int], list[str]]:
    """The ports of what `make up` starts, by their names in the environment, and what is not installed.

    Raises:
        NotReady: one is in use.
    """
    missing = [name for name in PROGRAMS if not is_installed(name)]
    wanted = {**PORTS, **DEBIAN_PORTS}
    for name in missing:
        del wanted[f"{name.upper()}_PORT"]
    return check_ports({name: int(os.environ.get(name, port)) for name, port in wanted.items()}), missing


def read_processes(places: Places) -> dict[str, str]:
    """The lines of the Procfile: name -> command."""
    lines = (places.root / "Procfile").read_text().splitlines()
    return {name: told.strip() for name, told in (line.split(":", 1) for line in lines if ":" in line)}


class Stack:
    """The Procfile's processes as children that end with this object.

    Args:
        places: the checkout and where logs go (var/log).
        ports: name of the environment variable -> port.
        names: which processes.
    """

    def __init__(self, places: Places, ports: dict[str, int], names: tuple[str, ...]) -> None:
        self._places, self.ports = places, ports
        commands = read_processes(places)
        self._commands = {name: commands[name] for name in names}
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        """Start them all."""
        folder = self._places.var / "log"
        folder.mkdir(parents=True, exist_ok=True)
        for name, command in self._commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                self._children[name] = subprocess.Popen(
                    command, shell=True, cwd=self._places.root, env=stack_environment(self.ports),
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them all: ask, wait, then kill what is left, by process group."""
        for child in self._children.values():
            _signal(child, signal.SIGTERM)
        deadline = time.monotonic() + 15
        for child in self._children.values():
            try:
                child.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(child, signal.SIGKILL)
                child.wait()
            _signal(child, signal.SIGKILL)

    def wait_until_ready(self, name: str, path: str, seconds: float = 120) -> str:
        """Wait until a process answers 200 at a path of its port.

        Returns:
            Its address.

        Raises:
            NotReady: it ended, or did not answer in time; the fix names its log.
        """
        import httpx

        address = f"http://127.0.0.1:{self.ports[f'{name.upper()}_PORT']}"
        fix = f"Read {self._places.var / 'log' / name}.log"
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._children[name].poll() is not None:
                raise NotReady(f"{name} ended with code {self._children[name].returncode}.", fix)
            try:
                if httpx.get(address + path, timeout=2).status_code == 200:
                    return address
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise NotReady(f"{name} did not answer at {address}{path} within {seconds:.0f} s.", fix)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return
