"""The image of a case in a real browser: its window, its slices, heat map and outline by a key each."""

import io
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import numpy as np
import pytest
import uvicorn
import yaml
from PIL import Image as Picture
from playwright.sync_api import expect

from imaging.vocabulary import ContentType, Kind, Modality
from registry.ledger import open_ledger
from registry.package import shelf
from services import pixels
from services.console.doors import COOKIE
from services.console.sessions import Sessions
from services.findings import encode
from services.qualification import FixedSlots
from services.routes import Routes
from services.served import load_package
from services.slots import Tables
from services.stack import free_port
from services.vault import find_file
from tests.browser.test_console import audit
from tests.tiny import draw_case, promote, train, write_root
from tests.tiny_gateway import NPY

PREDICT = "/v1/models/discs/predict"
PASSED = {"explanation": {"passed": True, "applies": True, "reasons": []}}
GREYS = """() => { const c = document.querySelector('#pixels canvas');
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  const seen = new Set(); let sum = 0, tinted = 0;
  for (let n = 0; n < d.length; n += 4) {
    seen.add(d[n]); sum += d[n] + d[n + 1] + d[n + 2]; tinted += d[n] !== d[n + 2]; }
  return { kinds: seen.size, sum, tinted }; }"""


class Standing(FixedSlots):
    """Slots that stand still: what serves was opened by the test."""

    def start(self):
        """Nothing is followed."""

    def stop(self):
        """Nothing was started."""


@pytest.fixture(scope="module")
def kept(browser, tmp_path_factory):
    """A checkout of one task, `discs`; north keeps pixels for a day, east keeps none."""
    made = write_root(tmp_path_factory.mktemp("kept"), discs=Kind.SEGMENTATION)
    path = made.root / "sites.yaml"
    sites = yaml.safe_load(path.read_text())
    sites["sites"]["north"]["keep_days"] = 1
    path.write_text(yaml.safe_dump(sites, sort_keys=False))
    with ThreadPoolExecutor(1) as pool:  # the browser's loop runs in this thread
        serves = pool.submit(lambda: promote(made, "discs", train(made, "discs"))).result()
    assert serves == ["north", "east"]
    return made


def open_version(kept, evaluation):
    """Version 1, as if its evaluation had said so."""
    digest, _ = open_ledger(kept.var).version("discs", 1)
    return load_package(shelf(kept.var, digest), (1, digest), "openvino/f32", evaluation)


@pytest.fixture(scope="module")
def slots(kept):
    """Version 1 at both sites, as if its heat maps had passed their audit."""
    opened = open_version(kept, PASSED)
    return Standing(kept, {("discs", site): opened for site in ("north", "east")})


@pytest.fixture(scope="module")
def server(kept, slots):
    """The application on a socket of loopback."""
    port = free_port()
    application = Routes(kept, slots).build()
    running = uvicorn.Server(uvicorn.Config(application, port=port, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    running.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def ask(server, kept):
    """Ask for an image; the id of the answer, once its pixels are written where they are kept."""

    def send(site="north", seed=0):
        drawn, kind = draw_case(Kind.SEGMENTATION, np.random.default_rng(seed))[0], ContentType.DICOM
        told = {"Content-Type": str(kind), "X-Site": site, "X-Subject": f"s{seed}"}
        answer = server.post(PREDICT, content=encode(drawn, kind, 2.0, "CT"), headers=told)
        assert answer.status_code == 200, answer.text
        number, deadline = answer.json()["id"], time.monotonic() + 60
        path = kept.var / "pixels" / site / datetime.now(UTC).date().isoformat() / number
        while site == "north" and not path.exists():
            assert time.monotonic() < deadline, "the pixels were not kept"
            time.sleep(0.02)
        return number, drawn

    return send


@pytest.fixture
def look(browser, server, kept):
    """A page of somebody who is logged in; what it complains of fails the test."""
    sessions, wrong, opened = Sessions(kept, open_ledger(kept.var)), [], []

    def make(number, **settings):
        context = browser.new_context(base_url=str(server.base_url), **settings)
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda told: told.type in ("error", "warning") and wrong.append(told.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"/console/login?code={sessions.make_link('author@test')}")
        page.get_by_role("button", name=re.compile("Log in as")).click()
        page.wait_for_url("**/console")
        page.goto(f"/console/cases/{number}")
        return page

    yield make
    for context in opened:
        context.close()
    assert not [told for told in wrong if "willReadFrequently" not in told]  # it is this test that reads


@pytest.fixture
def fetch(server, kept):
    """A request behind a session, limited to a site or not."""
    sessions = Sessions(kept, open_ledger(kept.var))

    def get(path, site="", session=True):
        begun = sessions._begin("author@test", site, "", time.time() + 60)
        return server.get(path, headers={"Cookie": f"{COOKIE}={sessions.cookie(begun)}"} if session else {})

    return get


def wait_for_image(page):
    page.locator("#pixels [data-part=tools]").wait_for(state="visible")
    state(page, "zoom")


def state(page, words, there=True):
    """Wait until the text beside the image says so, or does not any more."""
    told = expect(page.locator("[data-part=state]"))
    (told.to_contain_text if there else told.not_to_contain_text)(words)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_image_is_seen_and_can_be_used_by_everybody(look, ask, scheme, take):
    page = look(ask()[0], color_scheme=scheme)
    wait_for_image(page)
    assert page.evaluate(GREYS)["kinds"] > 20
    state(page, "32 rows, 32 columns; pixels of 2 × 2 mm; window -1000 to 200 HU; zoom 100 %")
    assert audit(page) == []
    take(page, f"case-image-{scheme}")


def test_the_value_under_the_crosshair_is_the_value_that_was_sent(look, ask):
    number, drawn = ask(seed=3)
    page = look(number)
    wait_for_image(page)
    page.locator("#pixels canvas").focus()
    page.keyboard.press("Control+ArrowRight")  # begins in the middle
    page.keyboard.press("Control+ArrowUp")
    page.keyboard.press("Control+ArrowRight")
    page.keyboard.press("Control+ArrowRight")
    reading = page.locator("[data-part=reading]").text_content()
    assert reading == f"row 15, column 18: {drawn[15, 18]} HU"


def test_the_window_follows_presets_numbers_and_the_mouse(look, ask):
    page = look(ask()[0])
    wait_for_image(page)
    whole = page.evaluate(GREYS)["sum"]
    page.get_by_label("Window").select_option("CT soft tissue")
    state(page, "window -160 to 240 HU")
    assert page.evaluate(GREYS)["sum"] < whole / 4  # lung is black in it
    page.get_by_label("from", exact=True).fill("-900")
    page.get_by_label("from", exact=True).press("Enter")
    state(page, "window -900 to 240 HU")
    box = page.locator("#pixels canvas").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 260, box["y"] + 200, steps=4)
    page.mouse.up()
    state(page, "-900 to 240", there=False)
    low, high = (float(page.locator(f"[data-part={name}]").input_value()) for name in ("low", "high"))
    assert (low + high) / 2 == pytest.approx(-330, abs=1)
    assert high - low > 1140 * 1.1  # to the right is wider
    page.keyboard.press("0")
    state(page, "window -1000 to 200 HU")


def test_zoom_and_pan_by_keys_buttons_and_wheel(look, ask):
    page = look(ask()[0])
    wait_for_image(page)
    before = page.evaluate(GREYS)["sum"]
    page.get_by_role("button", name="Zoom in").click()
    state(page, "zoom 125 %")
    page.keyboard.press("+")
    state(page, "zoom 156 %")
    page.keyboard.press("-")
    state(page, "zoom 125 %")
    box = page.locator("#pixels canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -100)
    state(page, "zoom 144 %")
    zoomed = page.evaluate(GREYS)["sum"]
    assert zoomed > before * 1.1  # more of the canvas is image
    page.locator("#pixels canvas").focus()
    for _ in range(30):
        page.keyboard.press("Shift+ArrowRight")
    page.wait_for_timeout(100)
    assert page.evaluate(GREYS)["sum"] < zoomed * 0.8  # it went off the canvas
    page.get_by_role("button", name="Reset").click()
    state(page, "zoom 100 %")


def test_the_heat_map_comes_and_goes_by_a_key_where_its_audit_was_passed(look, ask):
    page = look(ask()[0])
    wait_for_image(page)
    plain = page.evaluate(GREYS)["tinted"]
    page.keyboard.press("h")
    state(page, "heat map shown")
    assert page.get_by_role("button", name="Heat map").get_attribute("aria-pressed") == "true"
    assert page.evaluate(GREYS)["tinted"] > plain + 1000
    page.keyboard.press("h")
    state(page, "shown", there=False)
    assert page.evaluate(GREYS)["tinted"] == plain


def test_a_heat_map_that_was_not_audited_is_not_drawn_and_nobody_can_fetch_it(look, ask, kept, slots, fetch):
    number, _ = ask()
    before, withheld = slots.tables, open_version(kept, {})
    slots.tables = Tables(0, {("discs", "north"): withheld})
    try:
        page = look(number)
        wait_for_image(page)
        page.keyboard.press("h")
        state(page, "heat maps were not audited")
        assert page.get_by_role("button", name="Heat map").get_attribute("aria-pressed") == "false"
        told = fetch(f"/console/cases/{number}/heat")
        assert told.status_code == 503
        assert "were not audited" in told.text
        slots.tables = Tables(0, {})
        assert "is not open here" in fetch(f"/console/cases/{number}/heat").text
        page.reload()
        wait_for_image(page)  # the image is there without the version
        page.keyboard.press("m")
        state(page, "v1 is not open here, so nothing is drawn again")
    finally:
        slots.tables = before
        withheld.runner.close()


def test_the_outline_is_the_mask_that_was_answered(look, ask, server, fetch):
    number, drawn = ask(seed=5)
    page = look(number)
    wait_for_image(page)
    plain = page.evaluate(GREYS)["tinted"]
    page.keyboard.press("m")
    state(page, "outline shown")
    assert page.evaluate(GREYS)["tinted"] > plain + 500
    assert page.locator("[data-part=legend]").text_content() == "discrim"
    told = fetch(f"/console/cases/{number}/mask")
    again = server.post(PREDICT, content=encode(drawn, NPY, 2.0, Modality.CT),
                        headers={"Content-Type": NPY, "X-Site": "east", "Accept": "image/png"})  # fmt: skip
    mask = np.asarray(Picture.open(io.BytesIO(again.content)))
    assert mask.any()
    assert np.array_equal(np.frombuffer(told.content, np.uint8).reshape(32, 32), mask)


def test_a_volume_is_gone_through_slice_by_slice(look, ask):
    """No tiny task has volumes: the script is handed one instead of the plane."""
    number, _ = ask()
    volume = np.zeros((5, 32, 32), np.int16)
    volume[:] = (np.arange(5) * 200 - 900)[:, None, None]
    head = {"X-Shape": "5,32,32", "X-Axes": "depth,rows,columns", "X-Type": "int16", "X-Spacing-Mm": ""}
    page = look(number)
    page.route("**/pixels", lambda route: route.fulfill(body=volume.tobytes(), headers=head))
    page.reload()
    wait_for_image(page)
    state(page, "slice 3 of 5")
    sums = [page.evaluate(GREYS)["sum"]]
    page.get_by_label("Slice").fill("4")
    state(page, "slice 4 of 5")
    sums.append(page.evaluate(GREYS)["sum"])
    page.locator("#pixels canvas").focus()
    page.keyboard.press("ArrowUp")
    state(page, "slice 5 of 5")
    sums.append(page.evaluate(GREYS)["sum"])
    page.keyboard.press("ArrowUp")  # there is no sixth
    page.keyboard.press("ArrowDown")
    state(page, "slice 4 of 5")
    assert page.evaluate(GREYS)["sum"] == sums[1]
    box = page.locator("#pixels canvas").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.keyboard.down("Shift")
    page.mouse.wheel(0, 100)
    page.keyboard.up("Shift")
    state(page, "slice 5 of 5")
    assert sums == sorted(sums)
    assert sums[0] < sums[2]
    state(page, "the file tells no spacing")


def test_colours_are_shown_as_they_are(look, ask):
    number, _ = ask()
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[..., 0], picture[..., 1] = 200, 50
    head = {"X-Shape": "32,32,3", "X-Axes": "rows,columns,colours", "X-Type": "uint8", "X-Spacing-Mm": ""}
    page = look(number)
    page.route("**/pixels", lambda route: route.fulfill(body=picture.tobytes(), headers=head))
    page.reload()
    wait_for_image(page)
    state(page, "colours as they are")
    middle = """() => { const c = document.querySelector('#pixels canvas');
      return [...c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data]; }"""
    assert page.evaluate(middle) == [200, 50, 0, 255]
    assert not page.get_by_label("Window").is_visible()


def test_a_site_that_keeps_no_pixels_says_so_and_shows_none(look, ask):
    number, _ = ask(site="east", seed=8)
    page = look(number)
    assert page.get_by_text("sites.yaml keeps none at east").is_visible()
    assert page.locator("canvas").count() == 0
    assert page.get_by_text(f"formulary services replay {number} FILE").is_visible()
    assert audit(page) == []


def test_similar_reference_cases_show_their_picture_only_where_it_may_be_passed_on(look, ask):
    """Of tiny's cohort north's images may not be passed on, east's may; both lie on this machine."""
    page = look(ask(seed=11)[0])
    rows = page.locator("ol.similar li")
    assert rows.count() == 5
    assert all("of north" in text for text in rows.all_text_contents())
    assert page.locator("ol.similar img").count() == 0
    assert page.get_by_text("picture may not be passed on").count() == 5
    page = look(ask(site="east", seed=12)[0])
    assert page.locator("ol.similar img").count() == 5
    page.locator("ol.similar").scroll_into_view_if_needed()
    for picture in page.locator("ol.similar img").all():
        expect(picture).to_have_js_property("naturalWidth", 32)
    told = page.locator("ol.similar li").all_text_contents()
    away = [float(re.search(r"([\d.]+) standard", text)[1]) for text in told]
    assert away == sorted(away)


def test_raw_pixels_are_what_was_sent_and_nobody_else_may_embed_or_keep_them(ask, fetch):
    number, drawn = ask(seed=21)
    told = fetch(f"/console/cases/{number}/pixels")
    assert told.headers["X-Type"] == "int16"
    assert told.headers["X-Axes"] == "rows,columns"
    assert told.headers["X-Spacing-Mm"] == "2,2"
    sent = np.frombuffer(told.content, "<i2").reshape(32, 32)
    assert np.array_equal(sent, drawn)
    assert told.headers["Cache-Control"] == "no-store"
    assert told.headers["X-Content-Type-Options"] == "nosniff"
    assert told.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert told.headers["Content-Type"] == "application/octet-stream"


def test_answers_come_while_the_disk_of_the_pixels_is_blocked(server, kept, monkeypatch):
    free, before = threading.Event(), read_count(server, "formulary_pixels_dropped_total")
    real, drawn = pixels.write, draw_case(Kind.SEGMENTATION, np.random.default_rng(1))[0]
    body = encode(drawn, NPY, 2.0, "CT")
    monkeypatch.setattr(pixels, "write", lambda *told: free.wait(60) and real(*told))
    numbers = []
    for _ in range(30):
        answer = server.post(PREDICT, content=body, headers={"Content-Type": NPY, "X-Site": "north"})
        assert answer.status_code == 200
        numbers.append(answer.json()["id"])
    assert not any(find_file(kept.var, "north", number) for number in numbers)
    free.set()
    deadline = time.monotonic() + 60
    while not all(find_file(kept.var, "north", number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert read_count(server, "formulary_pixels_dropped_total") == before


def test_an_image_that_is_refused_is_not_kept(server, kept):
    def count():
        return sum(path.is_file() for path in (kept.var / "pixels").rglob("*"))

    before = count()
    for body in (b"no image", encode(np.zeros((8, 8), np.int16), NPY, 2.0, "CT")):
        answer = server.post(PREDICT, content=body, headers={"Content-Type": NPY, "X-Site": "north"})
        assert answer.status_code >= 400
    time.sleep(0.2)
    assert count() == before


def read_count(server, name):
    return sum(float(line.split()[-1]) for line in server.get("/metrics").text.splitlines()
               if line.startswith(name))  # fmt: skip


@pytest.mark.parametrize("name", ["pixels", "heat", "mask"])
def test_without_a_session_or_from_another_site_there_are_no_pixels(ask, fetch, name):
    number, _ = ask(seed=22)
    path = f"/console/cases/{number}/{name}"
    assert fetch(path, site="north").status_code == 200
    away = fetch(path, site="east")
    assert away.status_code == 403
    assert "You see east alone" in away.text
    stranger = fetch(path, session=False)
    assert stranger.status_code == 303
    assert "/console/login" in stranger.headers["Location"]


def test_what_is_no_prediction_is_not_found(fetch, ask):
    number, _ = ask(site="east", seed=23)
    for path in ("..%2f..%2fkeys", "0" * 36, "00000000-0000-0000-0000-000000000000"):
        assert fetch(f"/console/cases/{path}/pixels").status_code == 404
    assert fetch(f"/console/cases/{number}/pixels").status_code == 404
    for sha in ("0" * 64, "..%2f..%2fimages"):
        assert fetch(f"/console/cases/{number}/similar/{sha}.png").status_code == 404
