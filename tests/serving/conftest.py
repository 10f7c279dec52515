"""A real gateway on a free port of loopback, with two tiny tasks promoted at the internal sites."""

import pytest

from imaging.vocabulary import Kind
from tests.tiny import promote, train, write_root
from tests.tiny_gateway import Gateway


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A checkout of two tasks, `discs` (segmentation) and `nodes` (classification), each with version 1."""
    places = write_root(tmp_path_factory.mktemp("root"), discs=Kind.SEGMENTATION, nodes=Kind.CLASSIFICATION)
    for task in ("discs", "nodes"):
        assert promote(places, task, train(places, task)) == ["north", "east"]
    return places


@pytest.fixture(scope="session")
def gateway(places):
    with Gateway(places) as running:
        yield running
