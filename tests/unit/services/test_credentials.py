"""Who asks: keys and tokens, what they name, when they end, and what is written of it."""

import asyncio
import hashlib
import json
import stat
import threading
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from imaging.config import Places, read_sites
from imaging.errors import (
    ConfigError,
    Conflict,
    Forbidden,
    NotAuthenticated,
    NotReady,
    SiteRequired,
    UnknownSite,
)
from monitoring.logins import read_logins
from registry.access import read_token
from services.credentials import Credentials, Entrance, is_required
from services.keys import create_key, keys_path, read_keys, revoke_key, rotate_key

ISSUER, AUDIENCE = "https://idp.hospital.test", "formulary"


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr("services.credentials.LOOK_S", 0)
    sites = {name: {"kind": "internal", "title": name} for name in ("north", "east")}
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump({"sites": sites}))
    return Places(root=tmp_path, build=tmp_path / "build", var=tmp_path / "var")


@pytest.fixture
def open_door(places):
    opened = []

    def make(required=False):
        opened.append(Credentials(places, read_sites(places), required))
        return opened[-1]

    yield make
    for credentials in opened:
        credentials.close()


@pytest.fixture
def later(monkeypatch):
    """Let the door's clock go ahead by hours."""

    def move(hours):
        clock = SimpleNamespace(time=lambda: time.time() + 3600 * hours, monotonic=time.monotonic)
        monkeypatch.setattr("services.credentials.time", clock)

    return move


@pytest.fixture
def issue(places):
    """Tokens of an identity provider that roles.yaml names."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key()))
    (places.root / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "use": "sig"}]}))
    write_roles(places)

    def make(key=private, algorithm="ES256", **claims):
        now = int(time.time())
        told = {"sub": "ada@north", "iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 3600, **claims}
        return jwt.encode(told, key, algorithm, headers={"kid": "1"})

    return make


def write_roles(places, **told):
    issuer = {"issuer": ISSUER, "audience": AUDIENCE, "keys": "jwks.json", **told}
    (places.root / "roles.yaml").write_text(yaml.safe_dump({"issuers": [issuer]}))


def ask(credential, site=None, kind="Bearer"):
    headers = {b"authorization": f"{kind} {credential}".encode()}
    return headers | ({b"x-site": site.encode()} if site else {})


def test_without_a_key_the_header_names_the_site(open_door):
    door = open_door()
    assert not door.on
    assert door.site_of({b"x-site": b"north"}) == "north"
    with pytest.raises(SiteRequired):
        door.site_of({})
    with pytest.raises(UnknownSite):
        door.site_of({b"x-site": b"nroth"})


def test_a_key_names_its_site_whatever_the_header_would_like(places, open_door):
    _, key = create_key(places, "north", 90, "ada")
    door = open_door()
    assert door.on
    assert door.site_of(ask(key)) == door.site_of(ask(key, "north")) == "north"
    assert door.site_of(ask(key, kind="bearer")) == "north"
    for other in ("east", "nowhere", " north"):
        with pytest.raises(Forbidden, match="another site"):
            door.site_of(ask(key, other))


def test_the_first_key_shuts_a_running_door(places, open_door):
    door = open_door()
    create_key(places, "north", 90, "ada")
    with pytest.raises(NotAuthenticated):
        door.site_of({b"x-site": b"north"})


def test_what_is_not_a_credential_is_not_believed(places, open_door):
    (one, key), (_, other) = (create_key(places, site, 90, "ada") for site in ("north", "east"))
    door = open_door()
    secret = other.split("_", 2)[2]
    near = (f"fk_{one.id}", f"fk_{one.id}_", f"fk_{one.id}_{secret}", f"fk_{one.id}_{one.digest}")
    far = ("", "fk_", "fk__", "fk_é_è", "a.b.c", "\xff")
    for wrong in (*near, *far, key[:-1], f"{key}0", key.upper()):
        with pytest.raises(NotAuthenticated):
            door.site_of(ask(wrong))
    for headers in ({}, {b"x-site": b"north"}, ask(key, kind="Basic"), {b"authorization": key.encode()}):
        with pytest.raises(NotAuthenticated):
            door.site_of(headers)


def test_the_key_itself_is_kept_nowhere_and_the_file_is_its_owners_alone(places, open_door):
    made, key = create_key(places, "north", 90, "ada")
    open_door().site_of(ask(key))
    secret = key.removeprefix(f"fk_{made.id}_")
    assert len(secret) == 43  # 256 bits in base64
    assert made.digest == hashlib.sha256(secret.encode()).hexdigest()
    files = [path for path in places.root.rglob("*") if path.is_file()]
    assert keys_path(places.var) in files
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert stat.S_IMODE(keys_path(places.var).stat().st_mode) == 0o600
    assert (made.site, made.made_by) == ("north", "ada")


def test_a_rotated_key_holds_for_the_grace_and_no_longer(places, open_door, later):
    old, first = create_key(places, "north", 90, "ada")
    door = open_door()
    new, second = rotate_key(places, old.id, 24, "ada")
    assert door.site_of(ask(first)) == door.site_of(ask(second)) == "north"
    assert new.expires - new.created == timedelta(days=90)
    later(25)
    with pytest.raises(NotAuthenticated, match="expired"):
        door.site_of(ask(first))
    assert door.site_of(ask(second)) == "north"
    with pytest.raises(Conflict, match=f"rotated into {new.id}"):
        rotate_key(places, old.id, 24, "ada")


def test_a_grace_does_not_lengthen_a_key(places):
    old, _ = create_key(places, "north", 1, "ada")
    rotate_key(places, old.id, 720, "ada")
    assert read_keys(places.var)[0].expires == old.expires


def test_a_revoked_key_is_refused_by_a_door_that_stands_open(places, open_door):
    made, key = create_key(places, "north", 90, "ada")
    door = open_door()
    assert door.site_of(ask(key)) == "north"
    revoke_key(places, key, "ada")  # pasted whole, as a leaked one is found
    with pytest.raises(NotAuthenticated, match="revoked"):
        door.site_of(ask(key))
    with pytest.raises(Conflict, match="holds no more"):
        rotate_key(places, made.id, 0, "ada")
    with pytest.raises(Forbidden, match="No key 'nobody'"):
        revoke_key(places, "fk_nobody", "ada")


def test_the_door_stays_shut_when_the_last_key_ends_or_the_file_goes(places, open_door, later):
    _, key = create_key(places, "north", 1, "ada")
    door = open_door()
    keys_path(places.var).rename(places.root / "away")
    with pytest.raises(NotAuthenticated):
        door.site_of(ask(key, "north"))
    (places.root / "away").rename(keys_path(places.var))
    later(25)
    for one in (door, open_door()):
        with pytest.raises(NotAuthenticated):
            one.site_of(ask(key, "north"))


def test_nobody_comes_in_while_the_keys_cannot_be_read(places, open_door):
    _, key = create_key(places, "north", 90, "ada")
    door, path = open_door(), keys_path(places.var)
    whole = path.read_text()
    path.write_text(whole[:40])
    with pytest.raises(NotReady):
        door.site_of(ask(key))
    with pytest.raises(ConfigError):
        open_door()
    path.write_text(whole)
    assert door.site_of(ask(key)) == "north"


def test_access_can_be_asked_for_before_there_is_a_key(open_door):
    with pytest.raises(NotAuthenticated):
        open_door(required=True).site_of({b"x-site": b"north"})


def test_a_word_that_means_nothing_does_not_mean_off(monkeypatch):
    for told, wanted in (("", False), ("on", True)):
        monkeypatch.setenv("FORMULARY_ACCESS", told)
        assert is_required() is wanted
    monkeypatch.setenv("FORMULARY_ACCESS", "yes")
    with pytest.raises(ConfigError, match="'yes'"):
        is_required()


def test_a_key_without_a_site_comes_in_and_sends_no_image(places, open_door):
    made, key = create_key(places, "", 90, "ada")
    door = open_door()
    assert door.recognise(ask(key)).who == f"fk_{made.id}"
    with pytest.raises(Forbidden, match="no site"):
        door.site_of(ask(key, "north"))


@pytest.mark.parametrize(("site", "days", "error"), [("nroth", 90, UnknownSite), ("north", 0, ConfigError),
                                                     ("north", 367, ConfigError)])  # fmt: skip
def test_no_key_is_made_for_a_wrong_site_or_life(places, site, days, error):
    with pytest.raises(error):
        create_key(places, site, days, "ada")
    assert not keys_path(places.var).exists()


def test_keys_that_are_made_at_once_are_all_kept(places):
    threads = [threading.Thread(target=create_key, args=(places, "north", 90, "ada")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({key.id for key in read_keys(places.var)}) == 8


def test_a_token_names_the_site_by_its_claim(places, open_door, issue):
    door = open_door(required=True)
    assert door.site_of(ask(issue(site="east"))) == "east"
    with pytest.raises(Forbidden, match="another site"):
        door.site_of(ask(issue(site="east"), "north"))
    assert door.recognise(ask(issue())).who == "ada@north"
    with pytest.raises(Forbidden, match="no site"):
        door.site_of(ask(issue(), "east"))
    for nowhere in (["east"], {"east": 1}, 7, True, None, ""):
        with pytest.raises(NotAuthenticated):
            door.recognise(ask(issue(site=nowhere)))
    with pytest.raises(UnknownSite):
        door.site_of(ask(issue(site="nroth")))


def test_an_issuer_says_which_claim_it_is_and_which_sites_it_may_name(places, open_door, issue):
    write_roles(places, site="hospital", sites=["north"])
    door = open_door(required=True)
    assert door.site_of(ask(issue(hospital="north", site="east"))) == "north"
    for wrong in ("east", "North", "north ", ["north"]):
        with pytest.raises(NotAuthenticated):
            door.site_of(ask(issue(hospital=wrong)))


def test_tokens_that_nobody_vouches_for_are_refused(places, open_door, issue):
    door = open_door(required=True)
    stranger = ec.generate_private_key(ec.SECP256R1())
    forged = issue(stranger, site="east"), issue("s" * 32, "HS256", site="east")
    deep = jwt.utils.base64url_encode(b"[" * 40_000).decode()
    for wrong in (*forged, f"{deep}.e30.x", issue(aud="another", site="east"), issue(exp=1, site="east")):
        with pytest.raises(NotAuthenticated):
            door.site_of(ask(wrong))


def test_a_verified_token_is_believed_until_it_ends_or_its_issuer_goes(
    places, open_door, issue, later, monkeypatch
):
    door, token, reads = open_door(required=True), issue(site="east"), []
    monkeypatch.setattr(
        "services.credentials.read_token", lambda *given: reads.append(1) or read_token(*given)
    )
    assert {door.site_of(ask(token)) for _ in range(5)} == {"east"}
    assert len(reads) == 1
    (places.root / "roles.yaml").unlink()
    with pytest.raises(NotAuthenticated):
        door.site_of(ask(token))
    write_roles(places)
    assert door.site_of(ask(token)) == "east"
    later(2)
    door.site_of(ask(token))
    assert len(reads) == 4  # past its end the signature and the dates are looked at again


def test_what_happened_is_written_without_a_secret(places, open_door, issue):
    made, key = create_key(places, "north", 90, "ada")
    door, token = open_door(), issue(site="east")
    for _ in range(3):
        door.site_of(ask(key), "10.1.2.3")
    door.site_of(ask(token), "fd00:1:2:3::4")
    for wrong in (ask(f"fk_{made.id}_x"), ask(f"fk_{made.id}_y"), ask("fk_x_y"), {}):
        with pytest.raises(NotAuthenticated):
            door.site_of(wrong, "203.0.113.9")
    with pytest.raises(Forbidden):
        door.site_of(ask(key, "east"), "127.0.0.1")
    revoke_key(places, made.id, "bea")
    door.close()
    rows = [tuple(row.values())[1:] for row in read_logins(places.var, 50)]
    who = f"fk_{made.id}"
    told = {}
    for *kind, count in rows:
        told[tuple(kind)] = told.get(tuple(kind), 0) + count
    assert told == {
        (f"{who} by ada", "north", "key created", "here"): 1,
        (who, "north", "admitted", "10.1.2.0/24"): 1,
        ("ada@north", "east", "admitted", "fd00:1:2::/48"): 1,
        (who, "north", "not believed", "203.0.113.0/24"): 2,
        ("", "", "not believed", "203.0.113.0/24"): 1,
        ("", "", "no credential", "203.0.113.0/24"): 1,
        (who, "north", "another site", "loopback"): 1,
        (f"{who} by bea", "north", "key revoked", "here"): 1,
    }
    text = (places.var / "journal.db").read_bytes()
    assert key.encode() not in text
    assert token.encode() not in text


def call(door, path, headers=(), **scope):
    """What the entrance answers; 200 when it let the request through."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    told = {"type": "http", "path": path, "headers": list(headers), "server": ("127.0.0.1", 3000),
            "client": ("127.0.0.1", 5), "method": "GET", **scope}  # fmt: skip
    asyncio.run(Entrance(app, door)(told, None, send))
    return sent[0]


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/metrics", "/livez/", "/readyz/../metrics", "//livez", "/nothing"]
)
def test_every_path_but_health_asks(places, open_door, path):
    _, key = create_key(places, "north", 90, "ada")
    door = open_door()
    answer = call(door, path)
    assert answer["status"] == 401
    assert dict(answer["headers"])[b"www-authenticate"].startswith(b"Bearer")
    assert call(door, path, ask(key).items())["status"] == 200
    assert call(door, path, type="websocket")["type"] == "websocket.close"


def test_health_never_asks(open_door):
    door = open_door(required=True)
    assert {call(door, path)["status"] for path in ("/livez", "/readyz")} == {200}


@pytest.mark.parametrize(
    ("server", "status"),
    [(("127.0.0.1", 1), 200), (("::1", 1), 200), (("::ffff:127.0.0.1", 1), 200), (("/run/socket", None), 200),
     (None, 200), (("10.0.0.5", 1), 401), (("::ffff:10.0.0.5", 1), 401), (("2001:db8::1", 1), 401)],
)  # fmt: skip
def test_without_keys_only_loopback_is_answered_whoever_started_the_server(open_door, server, status):
    assert call(open_door(), "/docs", server=server)["status"] == status


def test_dates_of_a_key_are_in_utc(places):
    made, _ = create_key(places, "north", 90, "ada")
    assert abs((made.created - datetime.now(UTC)).total_seconds()) < 60
