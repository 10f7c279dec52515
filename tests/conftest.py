"""The databases of the ledger: SQLite, and a PostgreSQL that the test run starts for itself."""

import pytest

from tests.tiny_postgres import Postgres


@pytest.fixture(autouse=True, scope="session")
def _no_ledger_of_others():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FORMULARY_DATABASE", raising=False)
        yield


@pytest.fixture(scope="session")
def postgres():
    """A server of this test run's own."""
    with Postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, monkeypatch):
    """Where `open_ledger` finds the ledger: a test that asks for this runs on both databases."""
    if request.param == "postgresql":
        monkeypatch.setenv("FORMULARY_DATABASE", request.getfixturevalue("postgres").make())
    return request.param
