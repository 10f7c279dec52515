"""A heat map is shown where its audit was passed, and else withheld with the reason."""

import asyncio
import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from imaging.config import Places
from imaging.vocabulary import Kind, Modality
from registry.package import digest_package
from services.findings import encode
from services.qualification import FixedSlots
from services.routes import Routes
from services.served import load_package
from tests.tiny import draw_case
from tests.tiny_gateway import NPY

DISC = draw_case(Kind.SEGMENTATION, np.random.default_rng(0))[0]
PASSED = {"explanation": {"passed": True, "applies": True, "reasons": ["Hits beat chance."]}}
FAILED = {"explanation": {"passed": False, "applies": True, "reasons": ["Hits do not beat chance."]}}


def ask(places, tmp_path, evaluation, query):
    """The answer to one image of a package whose evaluation says so, through the real application."""
    package = places.stage("nodes", "package")
    served = load_package(package, (1, digest_package(package)), "openvino/f32", evaluation)
    scratch = Places(root=places.root, build=places.build, var=tmp_path)
    application = Routes(scratch, FixedSlots(scratch, {("nodes", "north"): served})).build()

    async def post():
        transport = httpx.ASGITransport(app=application)
        async with httpx.AsyncClient(transport=transport, base_url="http://heat") as client:
            body = encode(DISC, NPY, 2.0, Modality.CT)
            headers = {"Content-Type": NPY, "X-Site": "north"}
            return await client.post(f"/v1/models/nodes/predict{query}", content=body, headers=headers)

    try:
        return asyncio.run(post())
    finally:
        served.runner.close()


def test_a_map_that_passed_its_audit_is_a_picture_of_the_image(places, tmp_path):
    told = ask(places, tmp_path, PASSED, "?heat=1").json()["heat"]
    assert told["encoding"] == "image/png;base64"
    picture = np.asarray(Pillow.open(io.BytesIO(base64.b64decode(told["data"]))))
    assert picture.shape == DISC.shape
    assert picture.max() == 255


@pytest.mark.parametrize(("evaluation", "reason"), [(FAILED, "Hits do not beat chance."),
                                                    ({}, "heat maps were not audited")])  # fmt: skip
def test_a_map_that_failed_or_was_never_audited_is_withheld(places, tmp_path, evaluation, reason):
    told = ask(places, tmp_path, evaluation, "?heat=1").json()
    assert told["heat"] is None
    assert told["heat_withheld"] == reason
    assert "probabilities" in told


@pytest.mark.parametrize("evaluation", [PASSED, FAILED])
def test_explain_cam_is_another_name_for_it(places, tmp_path, evaluation):
    first, second = (ask(places, tmp_path, evaluation, query).json() for query in ("?heat=1", "?explain=cam"))
    assert {name: second.get(name) for name in ("heat", "heat_withheld")} == {
        name: first.get(name) for name in ("heat", "heat_withheld")
    }
    assert bool(second["heat"]) is (evaluation is PASSED)


def test_nobody_gets_a_map_that_was_not_asked_for(places, tmp_path):
    for query in ("", "?heat=0"):
        assert "heat" not in ask(places, tmp_path, PASSED, query).json()


def test_a_heat_that_is_neither_0_nor_1_is_refused_before_anything_is_journalled(gateway):
    before = gateway.count("formulary_requests_total", outcome="answered")
    told = gateway.client.post("/v1/models/nodes/predict?heat=2", content=b"x",
                               headers={"Content-Type": NPY, "X-Site": "north"})  # fmt: skip
    assert (told.status_code, told.json()["type"]) == (400, "/problems/unreadable")
    assert gateway.count("formulary_requests_total", outcome="answered") == before
