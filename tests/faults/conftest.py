"""A checkout for the tests of hostile callers, made once, and a token of somebody who may do everything."""

import json
import shutil
import time

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from imaging.config import Places
from imaging.vocabulary import Kind
from registry.access import admit
from registry.ledger import open_ledger
from tests.tiny import promote, train, write_root

ISSUER = {"issuer": "https://idp.test", "audience": "formulary", "keys": "jwks.json"}


def copy(places, folder):
    """The same checkout somewhere else."""
    root = shutil.copytree(places.root, folder / "root")
    return Places(root=root, build=root / "build", var=root / "var")


@pytest.fixture(scope="session")
def early(tmp_path_factory):
    """`discs` (segmentation) serves at north and east, `nodes` (classification) is registered."""
    places = write_root(tmp_path_factory.mktemp("early"), discs=Kind.SEGMENTATION, nodes=Kind.CLASSIFICATION)
    numbers = [train(places, task) for task in ("discs", "nodes")]
    assert numbers == [1, 1]
    promote(places, "discs", 1)
    admit(places.var, open_ledger(places.var), "registry", attests=True)
    (places.root / "roles.yaml").write_text(yaml.safe_dump({"issuers": [ISSUER]}))
    return places


@pytest.fixture(scope="session")
def pair(early, token, tmp_path_factory):
    """Both tasks serve."""
    places = copy(early, tmp_path_factory.mktemp("pair"))
    promote(places, "nodes", 1)
    return places


@pytest.fixture(scope="session")
def token(early):
    """A bearer token of somebody who may do everything in the registry, for six hours."""
    private, now = ec.generate_private_key(ec.SECP256R1()), int(time.time())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key()))
    (early.root / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "use": "sig"}]}))
    claims = {"sub": "committee@test", "iss": ISSUER["issuer"], "aud": ISSUER["audience"], "site": "north",
              "iat": now, "exp": now + 6 * 3600, "scope": "approve promote read-audit"}  # fmt: skip
    return jwt.encode(claims, private, "ES256", headers={"kid": "1"})


@pytest.fixture
def apart(pair, tmp_path):
    """A copy of it that a test may ruin; the token holds there too."""
    return copy(pair, tmp_path)
