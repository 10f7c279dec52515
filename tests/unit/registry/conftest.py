"""A ledger, two people and a pipeline's outputs, small enough to be made anew for each test."""

from functools import partial

import pytest

from registry.access import Acting, admit
from registry.ledger import open_ledger
from tests.tiny_registry import make_places, write_policy, write_stages


@pytest.fixture
def places(tmp_path):
    return make_places(tmp_path)


@pytest.fixture
def change_policy(places):
    """Write the policy again with other sections."""
    return partial(write_policy, places)


@pytest.fixture
def acting(places, ledger):
    """Somebody at work."""

    def make(signer, because="It was read."):
        return Acting(places, ledger, signer, because)

    return make


@pytest.fixture
def ledger(places):
    return open_ledger(places.var)


@pytest.fixture
def author(places, ledger):
    return admit(places.var, ledger, "author@test")


@pytest.fixture
def approver(places, ledger, author):
    return admit(places.var, ledger, "approver@test")


@pytest.fixture
def build(places):
    """Write what the pipeline would have written for a package with these bytes and Dice by site."""
    return partial(write_stages, places)
