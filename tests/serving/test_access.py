"""With access control on: who comes in, for which site, over what; and that no route was forgotten."""

import asyncio
import json
import shutil
import ssl
import subprocess
import sys
import time

import httpx
import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from starlette.routing import Route

from imaging.config import Places
from registry.access import admit
from registry.ledger import open_ledger
from services.keys import create_key, revoke_key, rotate_key
from services.routes import Routes
from services.slots import Slots
from tests.tiny_gateway import NPY, Gateway
from tests.tiny_tls import make_certificate

ISSUER = {"issuer": "https://idp.test", "audience": "formulary", "keys": "jwks.json", "site": "hospital"}


@pytest.fixture(scope="module")
def guarded(places, tmp_path_factory):
    """The same checkout somewhere else: the other tests' gateways go on without keys."""
    root = shutil.copytree(places.root, tmp_path_factory.mktemp("guarded") / "root")
    return Places(root=root, build=root / "build", var=root / "var")


@pytest.fixture(scope="module")
def issue(guarded):
    """Tokens of an identity provider that roles.yaml names."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key()))
    (guarded.root / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "use": "sig"}]}))
    (guarded.root / "roles.yaml").write_text(yaml.safe_dump({"issuers": [ISSUER]}))
    admit(guarded.var, open_ledger(guarded.var), "registry", attests=True)

    def make(**claims):
        now = int(time.time())
        told = {"sub": "ada@test", "iss": ISSUER["issuer"], "aud": "formulary", "iat": now, "exp": now + 60}
        return jwt.encode({**told, **claims}, private, "ES256", headers={"kid": "1"})

    return make


@pytest.fixture(scope="module")
def key(guarded):
    return create_key(guarded, "north", 90, "ada")[1]


@pytest.fixture(scope="module")
def door(guarded, issue, key):
    with Gateway(guarded) as running:
        yield running


def bearer(credential):
    return {"Authorization": f"Bearer {credential}"}


def find_routes(application):
    """Every route of the Starlette application, however it is wrapped."""
    while not hasattr(application, "routes"):
        inner = [one for one in vars(application).values() if callable(one) and hasattr(one, "__dict__")]
        application = next(one for one in inner if hasattr(one, "routes") or "Entrance" in type(one).__name__
                           or "Application" in type(one).__name__)  # fmt: skip
    return [route for route in application.routes if isinstance(route, Route)]


def test_every_route_but_health_answers_401_without_a_credential(door, guarded):
    routes = find_routes(Routes(guarded, Slots(guarded, "openvino/f32")).build())
    routes = [route for route in routes if not route.path.startswith("/console")]  # has a login of its own
    paths = {route.path.replace("{task}", "nodes").replace("{id}", "x") for route in routes}
    assert {"/docs", "/openapi.json", "/metrics", "/v1/models/nodes/predict"} <= paths
    paths |= {"/nothing", "/v1/models/nobody/predict", "/healthz", "/schema.json", "/docs.json", "//metrics"}
    methods = {method for route in routes for method in route.methods} | {"PUT", "OPTIONS"}
    for path in sorted(paths - {"/livez", "/readyz"}):
        for method in sorted(methods):
            answer = door.client.request(method, path, headers={"X-Site": "north"})
            assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Bearer"), (
                method,
                path,
            )
            assert method == "HEAD" or answer.json()["type"] == "/problems/not-authenticated"
    assert {door.client.get(path).status_code for path in ("/livez", "/readyz")} == {200}


def test_without_keys_nothing_is_answered_on_an_address_that_others_reach(places):
    """However it was started: `formulary services serve` would have refused."""
    application = Routes(places, Slots(places, "openvino/f32")).build()

    async def ask(host):
        transport = httpx.ASGITransport(app=application)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            answers = [await client.get("/docs"), await client.get("/livez")]
            path = "/v1/models/nodes/predict"
            answers += [await client.post(path, headers={"X-Site": "north", "Content-Type": NPY})]
        return [answer.status_code for answer in answers]

    assert asyncio.run(ask("127.0.0.1")) == [200, 200, 503]
    assert asyncio.run(ask("10.0.0.5")) == [401, 200, 401]


def test_the_site_is_the_credentials(door, key, issue):
    told = door.post(site=None, Authorization=f"Bearer {key}")
    assert (told.status_code, told.json()["site"]) == (200, "north")
    told = door.post(site=None, Authorization=f"Bearer {issue(hospital='east')}")
    assert (told.status_code, told.json()["site"]) == (200, "east")
    for credential in (key, issue(hospital="north")):
        assert door.post(site="north", Authorization=f"Bearer {credential}").status_code == 200
        told = door.post(site="east", Authorization=f"Bearer {credential}")
        assert (told.status_code, told.json()["type"]) == (403, "/problems/forbidden")


def test_a_credential_without_a_site_reads_and_sends_no_image(door, guarded, issue):
    key = create_key(guarded, "", 90, "ada")[1]
    door.wait(lambda: door.client.get("/metrics", headers=bearer(key)).status_code == 200, 2)
    for credential in (key, issue()):
        for path in ("/metrics", "/docs", "/openapi.json", "/v1/models"):
            assert door.client.get(path, headers=bearer(credential)).status_code == 200
        assert door.post(site="north", Authorization=f"Bearer {credential}").status_code == 403


def test_the_registry_still_asks_for_a_token_and_its_scope(door, key, issue):
    def ask(credential):
        answer = door.client.get("/v1/registry/history", params={"task": "nodes"}, headers=bearer(credential))
        return answer.status_code

    assert ask(key) == 401
    assert ask(issue(scope="approve")) == 403
    assert ask(issue(scope="read-audit")) == 200


def test_a_running_gateway_follows_what_becomes_of_a_key_within_a_second(door, guarded):
    old, first = create_key(guarded, "east", 90, "ada")

    def ask(key):
        return door.post(site=None, Authorization=f"Bearer {key}").status_code

    door.wait(lambda: ask(first) == 200, 1)
    _, second = rotate_key(guarded, old.id, 24, "ada")
    door.wait(lambda: ask(second) == 200, 1)
    assert ask(first) == 200
    revoke_key(guarded, old.id, "ada")
    door.wait(lambda: ask(first) == 401, 1)
    assert ask(second) == 200


def formulary(places, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "formulary", *arguments], cwd=places.root, capture_output=True, text=True,
        env={**Gateway(places).environment, "FORMULARY_IDENTITY": "ada"}, check=False, timeout=60,
    )  # fmt: skip


def test_keys_are_made_and_ended_on_the_command_line_and_the_audit_tells(places, tmp_path):
    shutil.copy(places.root / "sites.yaml", tmp_path)
    here = Places(root=tmp_path, build=tmp_path / "build", var=tmp_path / "var")
    made = formulary(here, "services", "keys", "create", "--site", "north")
    key = made.stdout.strip()
    assert key.startswith("fk_")
    assert "not shown again" in made.stderr
    assert formulary(here, "services", "keys", "rotate", key[:15], "--grace-hours", "1").returncode == 0
    assert formulary(here, "services", "keys", "revoke", key).returncode == 0
    listed = formulary(here, "services", "keys", "list", "--json").stdout
    assert [(one["site"], one["made_by"], one["holds"]) for one in json.loads(listed)] == (
        [("north", "ada", False), ("north", "ada", True)]
    )
    rows = json.loads(formulary(here, "services", "keys", "audit", "--json").stdout)
    assert [row["outcome"] for row in rows] == ["key created", "key rotated", "key revoked"]
    both = formulary(here, "services", "keys", "create", "--site", "north", "--no-site")
    assert (both.returncode, "for one site, or for none" in both.stderr) == (1, True)


def test_the_audit_tells_who_came_in_and_who_was_turned_away(door, guarded, key):
    door.post(site=None)
    door.post(site=None, Authorization=f"Bearer {key}")

    def told():
        rows = formulary(guarded, "services", "keys", "audit", "--json", "--last", "500")
        assert rows.returncode == 1, "roles.yaml asks for a scope"
        from monitoring.logins import read_logins

        return {(row["who"], row["outcome"], row["address"]) for row in read_logins(guarded.var, 500)}

    seen = told()
    assert (key[:15], "admitted", "loopback") in seen
    assert ("", "no credential", "loopback") in seen
    assert ("ada@test", "admitted", "loopback") in seen


def test_it_does_not_start_where_others_reach_it_without_a_credential_or_tls(places, guarded, key):
    bare = formulary(places, "services", "serve", "--host", "0.0.0.0", "--plain-http")
    assert (bare.returncode, "nobody has a credential" in bare.stderr) == (1, True)
    plain = formulary(guarded, "services", "serve", "--host", "0.0.0.0")
    assert (plain.returncode, "nothing encrypts" in plain.stderr) == (1, True)
    files = ("--certificate", str(guarded.root / "none.pem"), "--key", str(guarded.root / "none.key"))
    lost = formulary(guarded, "services", "serve", *files)
    assert (lost.returncode, "none.pem: No such file" in lost.stderr) == (1, True)


def test_it_answers_over_tls_alone_where_it_has_a_certificate(guarded, key):
    pem, private = make_certificate(guarded.root)
    trust = ssl.create_default_context(cafile=pem)
    with Gateway(guarded, "--certificate", str(pem), "--key", str(private), trust=trust) as running:
        told = running.post(site=None, Authorization=f"Bearer {key}")
        assert (told.status_code, told.json()["site"]) == (200, "north")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{running.port}/livez")
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"https://127.0.0.1:{running.port}/livez")
        old = ssl.create_default_context(cafile=pem)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_ciphers("AES128-SHA")  # what keeps no secrets once the key is lost
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://127.0.0.1:{running.port}/livez", verify=old)
