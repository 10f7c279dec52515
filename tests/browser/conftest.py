"""A real gateway with answers, alarms and a request that waits, and Chromium from Debian to look at it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from imaging.config import read_params
from imaging.vocabulary import Kind, Modality
from monitoring.monitor import Monitor
from registry.access import Acting, admit
from registry.ledger import open_ledger
from registry.promotion import request as ask_for
from services.findings import encode
from tests.debian import need
from tests.tiny import SIZE, promote, train, train_another, write_cohort, write_root
from tests.tiny_gateway import NPY, Gateway

CHROMIUM = Path("/usr/bin/chromium")
PICTURES = Path(__file__).parents[2] / "build" / "screenshots"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """`nodes` with version 1 serving at two sites; version 2 was asked for by author@test and waits."""
    need("chromium", CHROMIUM.exists())
    places = write_root(tmp_path_factory.mktemp("root"), nodes=Kind.CLASSIFICATION)
    path = places.policies / "nodes.yaml"
    watched = {"surveillance": {"unit": "subject", "budget_days": 180}}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | watched))
    write_cohort(places, "nodes", Kind.CLASSIFICATION, subjects=96)  # 24 in the reference of each site
    assert promote(places, "nodes", train(places, "nodes")) == ["north", "east"]
    ledger = open_ledger(places.var)
    ask_for(
        Acting(places, ledger, admit(places.var, ledger, "author@test")), "nodes", train_another(places, 8)
    )
    return places


def send(gateway, site, count, noise, seed):
    """Ask for cases, each of another subject, drawn with so much noise."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.normal(-600, noise, (SIZE, SIZE)).astype(np.int16)
        body = encode(pixels, NPY, 2.0, Modality.CT)
        answer = gateway.post("nodes", body, site=site, **{"X-Subject": f"{seed}-{number}"})
        assert answer.status_code == 200


@pytest.fixture(scope="module")
def gateway(places):
    """At east noise doubled after 60 cases, which raised alarms; north sent too few cases to say."""
    with Gateway(places) as running:
        send(running, "east", 60, 60, 1)
        send(running, "east", 60, 120, 2)
        send(running, "north", 5, 60, 3)
        done = Monitor(places, read_params(places)).pass_once()
        assert {alarm.site for alarm in done.alarms} == {"east"}
        yield running


@pytest.fixture(scope="module")
def browser(places):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def make_link(gateway):
    return gateway.make_link


@pytest.fixture
def open_page(browser, gateway):
    """A page of a browser of its own; what it complains of, or asks of another host, fails the test."""
    opened, wrong = [], []

    def make(**settings):
        context = browser.new_context(base_url=f"http://127.0.0.1:{gateway.port}", **settings)
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on(
            "console", lambda told: wrong.append(told.text) if told.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if foreign(asked.url, gateway) else None)
        page.wrong = wrong
        opened.append(context)
        return page

    yield make
    for context in opened:
        context.close()
    assert not wrong


def foreign(url, gateway):
    return not url.startswith((f"http://127.0.0.1:{gateway.port}/", "data:"))


@pytest.fixture
def come_in(open_page, make_link):
    """A page of somebody who followed a link."""

    def make(identity="author@test", **settings):
        page = open_page(**settings)
        page.goto(make_link(identity))
        page.get_by_role("button", name=re.compile("Log in as")).click()
        page.wait_for_url("**/console")
        return page

    return make


@pytest.fixture(scope="module")
def take():
    """Keep a screenshot under build/screenshots."""
    shutil.rmtree(PICTURES, ignore_errors=True)

    def keep(page, name):
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    return keep
