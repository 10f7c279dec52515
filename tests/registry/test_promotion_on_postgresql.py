"""What tests/unit/registry/test_promotion.py asks, with the ledger in PostgreSQL."""

import pytest

from tests.unit.registry.conftest import *  # noqa: F403
from tests.unit.registry.test_promotion import *  # noqa: F403


@pytest.fixture(autouse=True)
def _in_postgresql(postgres, monkeypatch):
    monkeypatch.setenv("FORMULARY_DATABASE", postgres.make())
