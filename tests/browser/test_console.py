"""The console in a real browser, as people use it: find what went wrong, see why, contain it, approve."""

import re

from imaging.vocabulary import Decision, Judged
from monitoring.records import Assessment, open_records
from registry.ledger import open_ledger

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


def test_the_eye_finds_the_site_that_went_wrong_and_a_click_says_why(come_in):
    page = come_in()
    first = page.locator("#told a").first
    assert re.match(r"▲ alarm\s*nodes at east", first.inner_text())
    assert page.locator("#board thead th").nth(1).inner_text() == "east", "what is wrong comes first"
    first.click()
    page.wait_for_url(f"**{SITE}/east")
    assert page.get_by_text("What changed first").is_visible()
    assert page.locator("svg.chart .over").count() >= 1
    assert "One false alarm in 180 days" in page.content()
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
