"""What a test needs of Debian: where it is missing the test is skipped by name, and with CI=true it fails."""

import os

import pytest


def need(package, there):
    """Skip, or fail where nothing may be skipped, when something of a Debian package is not there."""
    if there:
        return
    told = f"the Debian package {package} is not installed: deploy/debian.sh installs it"
    if os.environ.get("CI") == "true":
        pytest.fail(told)
    pytest.skip(told)
