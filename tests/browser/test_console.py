"""The console in a real browser, as people use it: find what went wrong, see why, contain it, approve."""

import json
import re
import time

import jwt
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from imaging.vocabulary import Decision, Judged
from monitoring.records import Alarm, Assessment, open_records
from registry.access import Acting, admit
from registry.decisions import resume, suspend
from registry.ledger import open_ledger
from registry.promotion import request
from registry.signing import load_signer

SITE = "/console/tasks/nodes/sites"
PAGES = {
    "matrix": "/console", "site-with-alarm": f"{SITE}/east", "site-with-few-cases": f"{SITE}/north",
    "site-without-version": f"{SITE}/harbour", "version": "/console/tasks/nodes/versions/1",
    "version-that-waits": "/console/tasks/nodes/versions/2", "queue": "/console/queue", "case": "",
    "card": "/console/tasks/nodes/versions/1/card",
}  # fmt: skip


def newest_case(places, site="east"):
    with open_records(places.var).engine.connect() as connection:
        told = connection.exec_driver_sql(
            "SELECT id FROM predictions WHERE site = ? ORDER BY seq DESC", (site,)
        )
        return told.scalar()


def audit(page):
    """What axe-core finds serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    told = Axe().run(page).response
    assert len(told["passes"]) > 5, "axe-core looked at nothing"
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in told["violations"]
            if one["impact"] in ("serious", "critical")]  # fmt: skip


def confirm(page, action, because):
    """Open an action's form, say why, tick the box and press the button."""
    part = page.locator("details", has=page.locator("summary", has_text=action)).first
    if part.get_attribute("open") is None:
        part.locator("summary").click()
    part.get_by_label("Because").fill(because)
    part.get_by_role("checkbox").check()
    part.get_by_role("button", name=action, exact=True).click()


def test_a_card_is_awaited_by_a_page_that_looks_again_and_holds_nobody_up(come_in, gateway):
    page = come_in()
    answer = page.goto(PAGES["card"])
    assert answer.status == 202
    assert page.get_by_text("The card is being drawn").is_visible()
    told = page.request.get(f"{PAGES['version']}/examples.svg")
    assert (told.status, int(told.headers["retry-after"]) > 0) == (503, True)
    page.goto(PAGES["version"])
    assert page.get_by_text("The examples are being drawn").count() == 1
    assert audit(page) == []
    start = time.monotonic()
    assert gateway.client.get("/metrics").status_code == 200
    assert time.monotonic() - start < 2
    page.get_by_text("The examples are being drawn").scroll_into_view_if_needed()
    page.locator("img.paper").wait_for(timeout=90_000)
    assert page.locator("img.paper").evaluate("one => one.decode().then(() => one.naturalWidth)") > 0
    assert page.goto(PAGES["card"]).status == 200


def test_every_page_loads_without_complaint_and_can_be_used_by_everybody(come_in, places, take):
    page = come_in()
    for name, path in PAGES.items():
        answer = page.goto(path or f"/console/cases/{newest_case(places)}")
        page.wait_for_load_state("networkidle")
        assert answer.status == 200, name
        assert "research use only" in page.content().lower(), name
        assert not page.wrong, name
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            take(page, f"{name}-{scheme}")
            assert name == "card" or audit(page) == [], (name, scheme)
        assert name == "card" or page.title().endswith("Formulary console")


def test_the_login_can_be_used_by_everybody_and_without_a_session_there_is_nothing_else(open_page, take):
    page = open_page()
    page.goto(f"{SITE}/east")
    assert page.url.endswith(f"/console/login?next={SITE}/east")
    assert audit(page) == []
    take(page, "login")


def test_a_link_opens_the_console_once_at_the_page_that_was_wanted(open_page, make_link):
    link = make_link("author@test")
    page = open_page()
    page.goto(link)
    page.goto(link)  # a preview spends nothing
    page.get_by_role("button", name="Log in as author@test").click()
    page.wait_for_url("**/console")
    assert page.get_by_text("author@test").is_visible()
    other = open_page()
    assert other.goto(link).status == 401
    assert other.get_by_role("alert").inner_text().count("This link was used.") == 1
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/console/login")
    page.goto("/console/queue")
    assert "/console/login" in page.url
    other.wrong.clear()  # Chromium tells of the 401


def test_the_eye_finds_the_site_that_went_wrong_and_a_click_says_why(come_in, places):
    page = come_in()
    first = page.locator("#told a").first
    assert re.match(r"▲ alarm\s*nodes at east", first.inner_text())
    assert page.locator("#board thead th").nth(1).inner_text() == "east", "what is wrong comes first"
    first.click()
    page.wait_for_url(f"**{SITE}/east")
    assert page.get_by_text("What changed first").is_visible()
    assert page.locator("svg.chart .over").count() >= 1
    assert "One false alarm in 180 days" in page.content()
    assert page.get_by_text("Nearest to a limit:").is_visible()
    alarms = [one for one in open_records(places.var).read(Alarm, "nodes", "east") if one.kind == "chart"]
    with open_records(places.var).engine.connect() as connection:
        rows = [row[0] for row in connection.exec_driver_sql(
            "SELECT id FROM predictions WHERE site = 'east' AND version = 1 ORDER BY seq")]  # fmt: skip
    told = page.locator(".cases a").all_inner_texts()
    assert len(set(told)) == len(told) > 6
    assert all(re.match(r"[0-9a-f]{8}, (positive|negative) \(\d\.\d\d\), 20", one) for one in told)
    began = int(re.search(r"case (\d+)", sorted(alarms, key=lambda one: one.at)[-1].since).group(1))
    assert rows[began - 1][:8] in {one[:8] for one in told}
    assert rows[max(one.last_seq for one in alarms) - 1][:8] in {one[:8] for one in told}
    page.locator(".cases a").first.click()
    page.wait_for_url("**/console/cases/*")
    assert page.get_by_role("cell", name=re.compile("probability .* threshold")).is_visible()


def test_a_place_with_few_cases_says_so(come_in):
    page = come_in()
    page.goto(f"{SITE}/north")
    assert page.get_by_text("not enough cases").count() >= 1
    page.goto(f"{SITE}/harbour")
    assert page.get_by_text("No version is approved here.").is_visible()
    assert page.get_by_role("button", name="Suspend").count() == 0


def test_a_suspended_site_is_told_why_and_answers_again_when_it_is_resumed(come_in, gateway, take):
    page = come_in()
    page.goto(f"{SITE}/east")
    confirm(page, "Suspend", "Noise doubled; see the alarm.")
    page.wait_for_url(f"**{SITE}/east")
    assert page.get_by_role("status").inner_text().startswith("nodes answers nobody at east")
    take(page, "site-suspended")
    gateway.wait(lambda: gateway.post("nodes", site="east").status_code == 503)
    told = gateway.post("nodes", site="east")
    assert "Noise doubled; see the alarm." in told.json()["detail"]
    assert gateway.post("nodes", site="north").status_code == 200
    page.goto("/console")
    assert page.locator("td.is-suspended").count() == 1
    page.goto(f"{SITE}/east")
    confirm(page, "Resume", "It was the scanner's filter.")
    gateway.wait(lambda: gateway.post("nodes", site="east").status_code == 200)
    assert page.get_by_text("■ suspended").count() == 0


def test_the_asker_cannot_approve_and_a_second_person_can(come_in, places, take):
    page = come_in("author@test")
    page.goto("/console/queue")
    take(page, "queue-with-request")
    confirm(page, "Approve", "I trust myself.")
    told = page.get_by_role("alert").inner_text()
    assert "author@test" in told
    assert audit(page) == []
    page.wrong.clear()  # Chromium tells of the 403
    ledger = open_ledger(places.var)
    assert ledger.champions("nodes")["north"].version == 1
    page = come_in("approver@test")
    page.goto("/console/queue")
    confirm(page, "Approve", "The gate's reasons were read.")
    page.wait_for_url("**/console/queue")
    assert "nodes v2 is champion at" in page.get_by_role("status").inner_text()
    assert ledger.champions("nodes")["north"].version == 2
    last = ledger.events("nodes", Decision.APPROVED)[-1]
    assert (last.actor, last.body["because"]) == ("approver@test", "The gate's reasons were read.")
    assert page.get_by_text("No requests wait.").is_visible()


def test_enter_in_the_reason_assesses_nothing_and_a_correction_needs_the_truth(come_in, places):
    page, number = come_in("approver@test"), newest_case(places)
    page.goto(f"/console/cases/{number}")
    reason = page.get_by_label("Reason")
    assert reason.get_attribute("maxlength") == "500"
    reason.fill("A vessel" + "x" * 300)
    reason.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.get_by_role("button", name="Accept").evaluate("one => one === document.activeElement")
    page.get_by_role("button", name="Correct").click()
    assert "What is right instead?" in page.get_by_role("alert").inner_text()
    assert reason.input_value().startswith("A vesselxxx")
    reason.evaluate("one => { one.removeAttribute('maxlength'); one.value = 'y'.repeat(501); }")
    page.get_by_label("Truth").select_option("negative")
    page.get_by_role("button", name="Correct").click()
    assert "The reason has 501 characters. Say it in at most 500." in page.get_by_role("alert").inner_text()
    assert page.get_by_label("Truth").input_value() == "0"
    assert [one for one in open_records(places.var).read(Assessment) if one.prediction == number] == []
    reason.fill("z" * 500)
    page.get_by_role("button", name="Correct").click()
    page.wait_for_selector("text=Your assessment was written")
    (row,) = [one for one in open_records(places.var).read(Assessment) if one.prediction == number]
    assert (row.verdict, row.truth, row.reason) == (Judged.CORRECTED, 0, "z" * 500)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.wrong.clear()  # Chromium tells of both 422


def test_who_may_only_read_assesses_nothing(come_in, places):
    roles, number = places.root / "roles.yaml", newest_case(places)
    page, before = come_in("approver@test"), len(open_records(places.var).read(Assessment))
    page.goto(f"/console/cases/{number}")
    try:
        roles.write_text("identities: {approver@test: [read-audit]}")
        page.get_by_role("button", name="Accept").click()
        assert "approver@test may not promote" in page.get_by_role("alert").inner_text()
        assert len(open_records(places.var).read(Assessment)) == before
        roles.write_text("identities: {approver@test: [read-audit, promote]}")
        page.get_by_role("button", name="Accept").click()
        page.wait_for_selector("text=Your assessment was written")
    finally:
        roles.unlink()
    page.wrong.clear()  # Chromium tells of the 403


WATCH = """where => { window.changes = 0; window.watch?.disconnect();
  window.watch = new MutationObserver(told => { window.changes += told.length; });
  const all = {subtree: true, childList: true, characterData: true};
  window.watch.observe(document.querySelector(where), all); }"""


def test_the_matrix_looks_again_and_takes_neither_the_focus_nor_the_word(come_in, places):
    page, ledger = come_in(), open_ledger(places.var)
    acting = Acting(places, ledger, load_signer(places.var, "author@test"), "A test of the matrix.")
    page.clock.install()
    page.goto("/console")

    def look():
        with page.expect_response("**/console?*") as told:
            page.clock.run_for(61_000)
        return told.value.status

    page.evaluate(WATCH, "main")
    page.locator("#cell-nodes-north").focus()
    assert (look(), page.evaluate("changes")) == (204, 0)
    page.evaluate(WATCH, "#said")
    said = page.locator("#said").inner_text()
    suspend(acting, "nodes", ("east",))  # it had alarms: as many places need a look as before
    assert look() == 200
    page.locator("td.is-suspended").wait_for()
    assert page.evaluate("document.activeElement.id") == "cell-nodes-north"
    assert (page.locator("#said").inner_text(), page.evaluate("changes")) == (said, 0)
    suspend(acting, "nodes", ("north",))
    assert look() == 200
    page.locator("td.is-suspended").nth(1).wait_for()
    assert page.evaluate("document.activeElement.id") == "cell-nodes-north"
    assert page.locator("#said").inner_text() != said
    assert page.evaluate("changes") > 0
    resume(acting, "nodes", ("east", "north"))
    assert page.locator(".wrong").evaluate("one => getComputedStyle(one).overflowY") == "visible"


def test_a_reader_assesses_a_case_by_keyboard(come_in, places):
    page, number = come_in("approver@test"), newest_case(places, "north")
    page.goto(f"/console/cases/{number}")
    page.keyboard.press("r")
    assert page.get_by_role("button", name="Reject").evaluate("one => one === document.activeElement")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Your assessment was written")
    (row,) = [one for one in open_records(places.var).read(Assessment) if one.prediction == number]
    assert (row.verdict, row.source, row.site) == (Judged.REJECTED, "console", "north")
    assert row.truth in (0, 1)
    assert "approver" not in row.reader
    assert page.locator("#assessment tbody tr").count() == 1


def test_alarms_are_acknowledged_and_the_place_is_well_again(come_in, places):
    page = come_in()
    page.goto(f"{SITE}/east")
    assert open_ledger(places.var).state("nodes").alarms["east"]
    confirm(page, "Acknowledge", "The filter was set back.")
    page.get_by_role("status").filter(has_text=re.compile("closed", re.IGNORECASE)).wait_for()
    assert "east" not in open_ledger(places.var).state("nodes").alarms


def test_a_form_without_the_sessions_stamp_changes_nothing(come_in, places):
    page = come_in()
    before = open_ledger(places.var).generation()
    form = {"action": "suspend", "because": "A forged form.", "sure": "yes"}
    for given in (form, form | {"stamp": "0" * 64}):
        assert page.request.post(f"{SITE}/north", form=given).status == 403
    assert open_ledger(places.var).generation() == before


def test_everything_can_be_reached_by_keyboard(come_in):
    page = come_in()

    def focused():
        return page.evaluate("document.activeElement.innerText || document.activeElement.id")

    page.goto("/console")
    page.keyboard.press("Tab")
    assert focused() == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    page.keyboard.press("/")
    assert focused() == "find"
    page.keyboard.type("nowhere")
    page.wait_for_selector("text=No place matches.")
    page.keyboard.press("Control+A")
    page.keyboard.type("nort")
    page.wait_for_selector("#board th:has-text('north')")
    assert page.locator("#board thead th").count() == 2
    page.get_by_role("heading", level=1).click()
    page.keyboard.press("g")
    page.keyboard.press("q")
    page.wait_for_url("**/console/queue")
    page.keyboard.press("t")
    theme = page.locator("html").get_attribute("data-theme")
    page.keyboard.press("g")
    page.keyboard.press("f")
    page.wait_for_url("**/console")
    assert (theme, page.locator("html").get_attribute("data-theme")) == ("dark", "dark")


def test_j_and_k_go_from_one_case_to_the_next(come_in):
    page = come_in()
    page.goto(f"{SITE}/north")
    links = page.locator(".cases a")
    for key, number in (("j", 0), ("j", 1), ("k", 0)):
        page.keyboard.press(key)
        assert links.nth(number).evaluate("one => one === document.activeElement")
    page.keyboard.press("Enter")
    page.wait_for_url("**/console/cases/*")


def test_without_scripts_the_console_does_the_same(come_in, gateway):
    page = come_in(java_script_enabled=False)
    page.get_by_label("Find a site or a task").fill("nort")
    page.get_by_role("button", name="Find").click()
    assert page.locator("#board thead th").count() == 2
    page.goto(f"{SITE}/north")
    confirm(page, "Suspend", "A test without scripts.")
    gateway.wait(lambda: gateway.post("nodes", site="north").status_code == 503)
    confirm(page, "Resume", "It is over.")
    gateway.wait(lambda: gateway.post("nodes", site="north").status_code == 200)


def test_a_rollback_brings_the_version_before_back_here_and_nowhere_else(come_in, places, gateway):
    page, ledger = come_in(), open_ledger(places.var)
    assert {ledger.champions("nodes")[site].version for site in ("north", "east")} == {2}
    page.goto(f"{SITE}/east")
    confirm(page, "Roll back", "It was better before.")
    page.wait_for_selector("text=Version 1")
    assert {site: one.version for site, one in ledger.champions("nodes").items()} == {"north": 2, "east": 1}
    gateway.wait(lambda: gateway.post("nodes", site="east").json()["version"] == 1)
    assert gateway.post("nodes", site="north").json()["version"] == 2
    assert ledger.events("nodes")[-1].body["because"] == "It was better before."


def test_a_request_is_rejected_with_a_reason_and_waits_no_more(come_in, places):
    ledger = open_ledger(places.var)
    request(Acting(places, ledger, load_signer(places.var, "author@test")), "nodes", 2)  # for east again
    page = come_in("approver@test")
    page.goto("/console/queue")
    confirm(page, "Reject", "Its cohort lacks children.")
    page.wait_for_selector("text=No requests wait.")
    last = ledger.events("nodes", Decision.REJECTED)[-1]
    told = last.actor, last.body["version"], last.body["because"]
    assert told == ("approver@test", 2, "Its cohort lacks children.")
    page.goto("/console/tasks/nodes/versions/2")
    assert page.get_by_text("Its cohort lacks children.").is_visible()


def test_a_token_of_the_hospitals_own_login_opens_its_site_alone(open_page, places):
    private, now = ec.generate_private_key(ec.SECP256R1()), int(time.time())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key()))
    (places.root / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "use": "sig"}]}))
    issuer = {"issuer": "https://idp.test", "audience": "formulary", "keys": "jwks.json"}
    admit(places.var, open_ledger(places.var), "registry", attests=True)
    claims = {"sub": "ada@test", "iss": issuer["issuer"], "aud": issuer["audience"], "iat": now,
              "exp": now + 600, "site": "north", "scope": "read-audit"}  # fmt: skip
    page, roles = open_page(), places.root / "roles.yaml"
    try:
        roles.write_text(yaml.safe_dump({"issuers": [issuer]}))
        page.goto(f"/console/login?next={SITE}/north")
        page.get_by_label("Token of an issuer").fill("a.b.c")
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("alert").wait_for()
        assert audit(page) == []
        token = jwt.encode(claims, private, "ES256", headers={"kid": "1"})
        page.get_by_label("Token of an issuer").fill(token)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"**{SITE}/north")
        assert page.get_by_text("ada@test").is_visible()
        assert page.goto(f"{SITE}/east").status in (403, 404)
        page.goto("/console")
        assert page.locator("#board thead th").all_inner_texts()[1:] == ["north"]
    finally:
        roles.unlink(missing_ok=True)
    page.wrong.clear()  # Chromium tells of the 401 and of the other site
