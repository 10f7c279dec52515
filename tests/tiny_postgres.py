"""A PostgreSQL of one's own, thrown away afterwards: unix socket only, never as root, ended by process id."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from tests.debian import need

PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/nowhere"))
# It ends with the test run, however that ends; PostgreSQL refuses to run as root.
ALONE = ["setpriv", "--pdeathsig=INT"]
NOBODY = ["--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.getuid() == 0 else []


class Postgres:
    """A server in a folder of its own; `with` starts and ends it."""

    def __enter__(self):
        need("postgresql", (PROGRAMS / "initdb").exists())
        self.folder = tempfile.mkdtemp(prefix="formulary-pg-", dir="/tmp")  # a socket's path must be short
        self._made = 0
        if NOBODY:
            shutil.chown(self.folder, "nobody", "nogroup")
        self._run("initdb", "--pgdata", f"{self.folder}/data", "--username=formulary", "--auth=trust",
                  "--encoding=UTF8", "--locale=C", "--no-sync").wait()  # fmt: skip
        self.start()
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def _run(self, program, *arguments):
        with open(f"{self.folder}/log", "ab") as log:
            return subprocess.Popen([*ALONE, *NOBODY, PROGRAMS / program, *arguments], cwd="/",
                                    stdout=log, stderr=subprocess.STDOUT)  # fmt: skip

    def start(self):
        """Start the server and wait until it answers. No fsync: a test cuts no power."""
        self.process = self._run("postgres", "-D", f"{self.folder}/data", "-k", self.folder,
                                 "-c", "listen_addresses=", "-c", "fsync=off")  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            try:
                return self.execute("SELECT 1")
            except OperationalError:
                assert time.monotonic() < deadline, Path(f"{self.folder}/log").read_text()[-3000:]
                time.sleep(0.1)

    def stop(self, how=signal.SIGINT):
        """End it: SIGINT closes its connections, SIGQUIT leaves at once and recovers at the next start."""
        self.process.send_signal(how)
        self.process.wait(timeout=30)

    def url(self, database="postgres"):
        """As FORMULARY_DATABASE takes it."""
        return f"postgresql://formulary@/{database}?host={self.folder}"

    def execute(self, statement, database="postgres"):
        """Run a statement as the owner, outside a transaction."""
        engine = create_engine(
            self.url(database).replace("sql:", "sql+psycopg:"), isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def make(self):
        """The URL of a new, empty database."""
        self._made += 1
        self.execute(f"CREATE DATABASE d{self._made}")
        return self.url(f"d{self._made}")
