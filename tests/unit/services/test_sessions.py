"""The console's door: links that open it once, sessions that end, and forms that no other page can send."""

import asyncio
import contextlib
import json
import os
import re
import stat
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from starlette.applications import Starlette

from imaging.config import read_sites
from imaging.errors import Forbidden, NotAuthenticated, Overloaded, TrustError
from imaging.vocabulary import Scope
from monitoring.journal import open_journal
from monitoring.logins import read_logins
from registry.access import admit, revoke
from registry.ledger import open_ledger
from registry.trials.conduct import TRUTH_SCOPE
from services.console.pages import Console
from services.console.sessions import IDLE_S, LINK_S, SESSION_S, Session, Sessions, Tries, read_secret
from services.credentials import Credentials
from services.slots import Slots
from tests.tiny_registry import make_places

ISSUER = {"issuer": "https://idp.test", "audience": "formulary", "keys": "jwks.json"}


@pytest.fixture
def places(tmp_path):
    return make_places(tmp_path)


@pytest.fixture
def ledger(places):
    opened = open_ledger(places.var)
    for who in ("author@test", "approver@test"):
        admit(places.var, opened, who)
    return opened


@pytest.fixture
def sessions(places, ledger):
    return Sessions(places, ledger)


@pytest.fixture
def later(monkeypatch):
    """Let the clock of sessions go ahead by seconds."""

    def move(seconds):
        clock = SimpleNamespace(
            time=lambda: time.time() + seconds, monotonic=lambda: time.monotonic() + seconds
        )
        monkeypatch.setattr("services.console.sessions.time", clock)

    return move


@pytest.fixture
def issue(places, ledger):
    """Tokens of an issuer that roles.yaml names."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key()))
    (places.root / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "use": "sig"}]}))
    who = {
        "author@test": ["read-audit", "promote"],
        "auditor@test": ["read-audit"],
        "clerk@test": ["promote"],
    }
    roles = {"issuers": [ISSUER], "identities": who}
    (places.root / "roles.yaml").write_text(yaml.safe_dump(roles))
    admit(places.var, ledger, "registry", attests=True)

    def make(**claims):
        now = int(time.time())
        told = {"sub": "ada@test", "iss": ISSUER["issuer"], "aud": "formulary", "iat": now, "exp": now + 600}
        return jwt.encode({**told, **claims}, private, "ES256", headers={"kid": "1"})

    return make


def test_a_link_opens_one_session_and_looking_at_it_spends_nothing(sessions):
    code = sessions.make_link("author@test")
    for _ in range(3):
        assert sessions.read_link(code)["who"] == "author@test"
    found = sessions.begin_by_link(code)
    assert (found.who, found.site) == ("author@test", "")
    for again in (sessions.read_link, sessions.begin_by_link):
        with pytest.raises(NotAuthenticated, match="was used"):
            again(code)


def test_of_many_who_use_a_link_at_once_one_comes_in(places, ledger, sessions):
    code, came = sessions.make_link("author@test"), []

    def use():
        try:
            came.append(Sessions(places, ledger).begin_by_link(code))
        except NotAuthenticated:
            came.append(None)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) == 8
    assert sum(one is not None for one in came) == 1


def test_a_link_holds_for_five_minutes(sessions, later):
    code = sessions.make_link("author@test")
    later(LINK_S - 5)
    assert sessions.read_link(code)
    later(LINK_S + 1)
    with pytest.raises(NotAuthenticated, match="five minutes"):
        sessions.begin_by_link(code)


@pytest.mark.parametrize("change", [lambda c: c[:-1] + "0", lambda c: "x" + c, lambda c: c.split(".")[0],
                                    lambda c: "", lambda c: "ä.ö"])  # fmt: skip
def test_a_link_that_was_changed_opens_nothing(sessions, change):
    code = sessions.make_link("author@test")
    changed = change(code) if change(code) != code else code[:-1] + "1"
    with pytest.raises(NotAuthenticated, match="not made here"):
        sessions.begin_by_link(changed)


def test_a_link_is_made_only_for_somebody_whose_trusted_key_lies_here(places, ledger, sessions):
    with pytest.raises(TrustError, match="has no key"):
        sessions.make_link("mallory@test")
    (key,) = [one.key for one in ledger.trusted_keys().values() if one.identity == "author@test"]
    code, found = sessions.make_link("author@test"), sessions.begin_by_link(sessions.make_link("author@test"))
    revoke(ledger, key, sessions.signer(Session("", "approver@test"), Scope.KEYS), "Left the house.")
    for act in (lambda: sessions.make_link("author@test"), lambda: sessions.begin_by_link(code),
                lambda: sessions.admit(found), lambda: sessions.signer(found, Scope.APPROVE)):  # fmt: skip
        with pytest.raises(Forbidden, match="not trusted"):
            act()


def test_a_session_ends_when_it_is_idle_or_old_and_closing_it_ends_it_everywhere(
    places, ledger, sessions, later
):
    def begin():
        return sessions.cookie(sessions.begin_by_link(sessions.make_link("author@test")))

    other = Sessions(places, ledger)  # another worker
    cookie = begin()
    assert other.find(cookie).who == "author@test"
    later(IDLE_S - 60)
    assert other.find(cookie, touch=False)
    later(IDLE_S + 60)
    assert other.find(cookie) is None, "nobody was at work for half an hour"
    later(0)
    assert other.find(cookie) is None, "it stays ended"
    cookie = begin()
    (path,) = (places.var / "console").glob("*.json")
    os.utime(path, (time.time() + SESSION_S, time.time() + SESSION_S))  # in use all day
    later(SESSION_S + 60)
    assert other.find(cookie) is None
    later(0)
    cookie = begin()
    other.close(other.find(cookie))
    assert sessions.find(cookie) is None


def test_a_cookie_holds_only_with_its_signature(sessions):
    cookie = sessions.cookie(sessions.begin_by_link(sessions.make_link("author@test")))
    number, seal = cookie.split(".")
    for forged in ("", number, f"{number}.", f"{number}.{'0' * 64}", f"x{number}.{seal}", f"../x.{seal}"):
        assert sessions.find(forged) is None
    assert sessions.find(cookie)


def test_secret_and_sessions_are_their_owners_alone_and_no_cookie_can_be_read_from_them(places, sessions):
    found = sessions.begin_by_link(sessions.make_link("author@test"))
    secret = places.var / "keys" / "console.key"
    assert len(secret.read_bytes()) == 32
    assert read_secret(places.var) == secret.read_bytes()
    kept = list((places.var / "console").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in [secret, *kept]} == {0o600}
    assert stat.S_IMODE((places.var / "console").stat().st_mode) == 0o700
    assert not any(found.number in path.name or found.number in path.read_text() for path in kept)
    secret.write_bytes(b"")
    with pytest.raises(TrustError, match="damaged"):
        sessions.find(sessions.cookie(found))


def test_a_token_of_the_process_makes_nobody_somebody_else(sessions, issue, monkeypatch):
    found = sessions.begin_by_link(sessions.make_link("author@test"))
    monkeypatch.setenv("FORMULARY_TOKEN", issue(sub="ada@test", scope="promote read-audit"))
    with pytest.raises(Forbidden, match="acts as ada@test"):
        sessions.signer(found, Scope.PROMOTE)


def test_a_token_opens_a_session_that_lasts_no_longer_and_does_no_more(sessions, issue, later):
    found = sessions.begin_by_token(issue(scope="read-audit", site="north"))
    assert (found.who, found.site) == ("ada@test", "north")
    assert found.until <= time.time() + 600
    sessions.admit(found)
    with pytest.raises(Forbidden, match="no scope promote"):
        sessions.signer(found, Scope.PROMOTE)
    able = sessions.begin_by_token(issue(scope="read-audit promote"))
    assert sessions.signer(able, Scope.PROMOTE).actor == "ada@test"
    later(700)
    assert sessions.find(sessions.cookie(able)) is None
    with pytest.raises(NotAuthenticated):
        sessions.begin_by_token("not.a.token")


def test_who_may_not_read_the_audit_sees_at_most_the_own_site(sessions, issue):
    sessions.admit(sessions.begin_by_token(issue(site="north")))
    for claims in ({}, {"scope": "promote"}):
        with pytest.raises(Forbidden, match="may not read-audit"):
            sessions.admit(sessions.begin_by_token(issue(**claims)))
    sessions.admit(sessions.begin_by_token(issue(sub="author@test")))
    with pytest.raises(Forbidden, match="may not read-audit"):
        sessions.admit(Session("", "approver@test"))  # roles.yaml does not name them


def test_who_fails_too_often_waits_and_the_others_do_not(later):
    tries = Tries()
    for _ in range(10):
        tries.check("10.0.0.0/24")
        tries.note("10.0.0.0/24")
    tries.check("10.0.1.0/24")
    with pytest.raises(Overloaded):
        tries.check("10.0.0.0/24")
    later(301)
    tries.check("10.0.0.0/24")


@pytest.fixture
def console(places, ledger):
    credentials = Credentials(places, read_sites(places), required=True)
    made = Console(places, open_journal(places.var), credentials, Slots(places), lambda _: None)
    yield made
    credentials.close()


@pytest.fixture
def ask(console):
    """One request of a browser to the console."""
    application = Starlette(routes=console.routes())

    def send(method, path, cookie="", headers=None, **form):
        async def go():
            transport = httpx.ASGITransport(app=application)
            async with httpx.AsyncClient(transport=transport, base_url="http://here.test") as client:
                told = {"sec-fetch-site": "same-origin"} if headers is None else headers
                given = {**told, "cookie": f"formulary-console={cookie}"}
                return await client.request(method, path, headers=given, data=form or None)

        return asyncio.run(go())

    return send


@pytest.fixture
def cookie(console):
    return console.sessions.cookie(console.sessions.begin_by_link(console.sessions.make_link("author@test")))


def test_without_a_session_nothing_is_shown_but_the_login(console, ask):
    paths = {route.path for route in console.routes()} - {
        "/console/login",
        "/console/static/{name}",
        "/console/",
    }
    assert len(paths) >= 8
    for path in paths:
        path = (
            re.sub(r"\{version:int\}", "1", path).replace("{task}", "brain-tissue").replace("{site}", "north")
        )
        for forged in ("", "x.y"):
            if path != "/console/logout":
                told = ask("GET", path.replace("{number}", "x"), forged)
                assert (told.status_code, told.headers["location"].split("?")[0]) == (
                    303,
                    "/console/login",
                ), path
            told = ask(
                "POST", path.replace("{number}", "x"), forged, action="suspend", because="why", sure="yes"
            )
            assert told.status_code in (401, 405), path
    assert ask("GET", "/console/login").status_code == 200
    assert ask("GET", "/console/static/console.css").status_code == 200


def test_every_answer_says_what_a_browser_may_do_with_it(ask, cookie):
    for path in ("/console/login", "/console", "/console/queue", "/console/static/console.js",
                 "/console/static/none.js", "/console/cases/none"):  # fmt: skip
        headers = ask("GET", path, cookie).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_a_form_needs_the_sessions_stamp_and_a_page_of_ours(console, ask, cookie, ledger):
    stamp, before = console.sessions.stamp(console.sessions.find(cookie)), ledger.generation()
    other = console.sessions.begin_by_link(console.sessions.make_link("author@test"))
    form = {"action": "suspend", "because": "A test.", "sure": "yes"}
    path = "/console/tasks/brain-tissue/sites/north"
    for headers, given in (
        (None, ""), (None, "0" * 64), (None, console.sessions.stamp(other)), ({}, stamp),
        ({"sec-fetch-site": "cross-site"}, stamp), ({"sec-fetch-site": "same-site"}, stamp),
        ({"sec-fetch-site": "cross-site", "origin": "http://here.test"}, stamp),
        ({"origin": "http://evil.test"}, stamp), ({"origin": "null"}, stamp),
    ):  # fmt: skip
        told = ask("POST", path, cookie, headers, **form, stamp=given)
        assert told.status_code == 403, (headers, given)
    assert ledger.generation() == before
    told = ask("POST", path, cookie, {"origin": "http://here.test"}, **form, stamp=stamp)
    assert told.status_code == 303
    assert ledger.generation() == before + 1
    assert ask("POST", "/console/login", "", {"origin": "http://evil.test"}, token="x").status_code == 403


def test_the_login_leads_to_the_console_alone_and_is_audited(console, ask, places):
    led = dict.fromkeys(
        ("//evil.test", "/docs", "/console/../docs?x", "https://evil.test/console"), "/console"
    )
    for wanted, led_to in (led | {"/console/queue": "/console/queue"}).items():
        code = console.sessions.make_link("author@test")
        told = ask("POST", "/console/login", code=code, next=wanted)
        assert (told.status_code, told.headers["location"]) == (303, led_to)
        kept = told.headers["set-cookie"].lower()
        assert all(word in kept for word in ("httponly", "samesite=strict", "path=/console"))
    assert ask("POST", "/console/login", code=code).status_code == 401
    console._credentials.close()
    rows = {(row["who"], row["outcome"]) for row in read_logins(places.var, 50)}
    assert {("author@test", "admitted"), ("", "not believed")} <= rows


def test_guessing_at_the_login_is_slowed_down_and_locks_no_link_out(ask, console):
    link = console.sessions.make_link("author@test")
    assert ask("POST", "/console/login", code=link).status_code == 303
    for _ in range(12):
        assert ask("POST", "/console/login", code=link).status_code == 401  # used: nobody guesses its seal
    for _ in range(10):
        assert ask("POST", "/console/login", token="guess").status_code == 401
    for guess in ({"token": "guess"}, {"code": "a.b"}):
        assert ask("POST", "/console/login", **guess).status_code == 429
    link = console.sessions.make_link("author@test")
    assert ask("POST", "/console/login", code=link).status_code == 303


def test_tries_are_counted_right_by_many_threads_at_once():
    tries, broken = Tries(), []

    def guess(network):
        try:
            for _ in range(300):
                tries.note(network)
                with contextlib.suppress(Overloaded):
                    tries.check("elsewhere")
        except RuntimeError as error:
            broken.append(error)

    before, threads = (
        sys.getswitchinterval(),
        [threading.Thread(target=guess, args=(str(n),)) for n in range(8)],
    )
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not broken


@pytest.mark.parametrize("site", [["north"], {"north": 1}, 7, True, None, ""])
def test_a_token_that_names_a_site_which_is_none_opens_nothing(sessions, issue, site):
    with pytest.raises(NotAuthenticated):
        sessions.begin_by_token(issue(site=site, scope="read-audit promote"))


def test_a_token_that_may_not_name_its_site_opens_nothing(places, sessions, issue):
    path, token = places.root / "roles.yaml", issue(site="north", scope="read-audit")
    found = sessions.begin_by_token(token)
    roles = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**roles, "issuers": [ISSUER | {"sites": ["east"]}]}))
    for site in ("north", "East", "east "):
        with pytest.raises(NotAuthenticated):
            sessions.begin_by_token(issue(site=site, scope="read-audit"))
    with pytest.raises(NotAuthenticated):
        sessions.admit(found)
    path.write_text(yaml.safe_dump({**roles, "issuers": [ISSUER | {"site": "hospital"}]}))
    with pytest.raises(NotAuthenticated, match="another site"):
        sessions.admit(found)  # it began as north's, and would be everybody's now


def test_a_token_does_no_more_than_roles_yaml_lets_its_person(sessions, issue):
    with pytest.raises(Forbidden, match="may not read-audit"):
        sessions.admit(sessions.begin_by_token(issue(sub="clerk@test", scope="read-audit promote")))
    with pytest.raises(Forbidden, match="may not read-audit"):
        sessions.admit(sessions.begin_by_token(issue(sub="author@test", scope="promote")))
    sessions.admit(sessions.begin_by_token(issue(sub="author@test", scope="read-audit")))


def test_who_only_reads_writes_no_labels(sessions, issue):
    for claims in ({"sub": "auditor@test"}, {"sub": "auditor@test", "scope": "read-audit promote"},
                   {"scope": "read-audit"}):  # fmt: skip
        found = sessions.begin_by_token(issue(**claims))
        sessions.admit(found)
        with pytest.raises(Forbidden, match="may not promote"):
            sessions.admit(found, TRUTH_SCOPE)
    sessions.admit(sessions.begin_by_token(issue(sub="author@test")), TRUTH_SCOPE)
    sessions.admit(sessions.begin_by_token(issue(site="north")), TRUTH_SCOPE)  # of its own site


def test_what_no_page_of_ours_sends_is_refused_and_is_no_fault(console, ask, cookie, caplog):
    stamp = console.sessions.stamp(console.sessions.find(cookie))
    path, long = "/console/tasks/brain-tissue/sites/north", "1" * 5000
    many = {f"field{number}": "x" for number in range(101)}
    assert ask("POST", path, cookie, stamp=stamp, **many).status_code == 400
    assert ask("POST", "/console/login", **many).status_code == 400
    for origin in ("http://[", "http://[::1", "//", "null"):
        assert ask("POST", path, cookie, {"origin": origin}, stamp=stamp).status_code == 403
    for number in (long, "9" * 30, "0", "-1", "x", "\u0663", "1%00"):
        for rest in ("", "/card", "/examples", "/examples.svg"):
            told = ask("GET", f"/console/tasks/brain-tissue/versions/{number}{rest}", cookie)
            assert told.status_code == 404, (number[:9], rest)
        told = ask("POST", "/console/queue", cookie, stamp=stamp, action="approve", version=number,
                   task="brain-tissue", sure="yes", because="why")  # fmt: skip
        assert told.status_code == 404
    for lost in (
        "/console/cases/%ff%00",
        "/console/tasks/%00/sites/north",
        f"/console/tasks/{long}/sites/{long}",
    ):
        assert 400 <= ask("GET", lost, cookie).status_code < 500
    told = ask("POST", "/console/login", token="x" * 70_000)
    assert (told.status_code, "over 64 KiB" in told.text, "slice" in told.text) == (413, True, False)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_logging_out_ends_the_session_for_whoever_copied_the_cookie(console, ask, cookie):
    stamp = console.sessions.stamp(console.sessions.find(cookie))
    assert ask("GET", "/console", cookie).status_code == 200
    assert ask("POST", "/console/logout", cookie, stamp=stamp).status_code == 303
    assert ask("GET", "/console", cookie).status_code == 303


def test_static_files_are_those_of_one_folder(ask):
    for name in ("..%2fpages.py", "%2e%2e%2fpages.py", ".hidden", "none.css", "%2fetc%2fpasswd"):
        assert ask("GET", f"/console/static/{name}").status_code == 404


def test_a_site_is_shown_its_own_pages_alone(console, ask, issue):
    found = console.sessions.begin_by_token(issue(site="north", scope="read-audit promote approve"))
    cookie, stamp = console.sessions.cookie(found), console.sessions.stamp(found)
    shown = ask("GET", "/console", cookie).text
    assert "sites/north" in shown
    assert "sites/east" not in shown
    assert ask("GET", "/console/tasks/brain-tissue/sites/north", cookie).status_code == 200
    for path in ("/console/tasks/brain-tissue/sites/east", "/console/queue"):
        assert ask("GET", path, cookie).status_code == 403
        told = ask("POST", path, cookie, action="suspend", because="A test.", sure="yes", stamp=stamp)
        assert told.status_code == 403
