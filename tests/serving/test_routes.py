"""The routes of a running gateway: what is answered, what is refused, and what is left behind either way."""

import base64
import hashlib
import io
import json
import re

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from imaging.vocabulary import ContentType, Modality
from monitoring.journal import open_journal
from registry.package import read_contract
from services.findings import encode
from tests.tiny_gateway import NPY, draw_pixels

CT = encode(draw_pixels(), NPY, 2.0, Modality.CT)


def as_npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def dicom(modality=Modality.CT, spacing=2.0):
    return encode(draw_pixels(), ContentType.DICOM, spacing, modality)


def nifti():
    return encode(draw_pixels(), ContentType.NIFTI, 2.0, Modality.CT)


@pytest.mark.parametrize("task", ["discs", "nodes"])
def test_the_four_kinds_of_file_get_the_same_answer(gateway, places, task):
    contract = read_contract(places.stage(task, "package"))
    answers = []
    for kind in ContentType:
        body = encode(draw_pixels(), kind, 2.0, Modality.CT, contract.png_offset)
        told = gateway.post(task, body, kind)
        assert told.status_code == 200, told.text
        answers.append(told.json().get("probabilities") or told.json()["mask"]["data"])
    assert answers.count(answers[0]) == 4


def test_a_classification_says_who_answered_and_how_sure(gateway, places):
    response = gateway.post(X_Request_ID="case-7")
    told = response.json()
    contract = read_contract(places.stage("nodes", "package"))
    assert set(told["probabilities"]) == {"none", "disc"}
    assert sum(told["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert told["positive"] is (told["probabilities"]["disc"] >= contract.threshold)
    assert (told["task"], told["version"], told["site"]) == ("nodes", 1, "north")
    assert (told["engine"], told["notice"]) == ("openvino/f32", "research use only")
    assert told["request_id"] == response.headers["x-request-id"] == "case-7"
    assert {"read", "decode", "engine", "findings", "journal"} <= set(
        re.findall(r"(\w+);dur=", response.headers["server-timing"])
    )


def test_a_segmentation_is_a_mask_with_areas(gateway):
    told = gateway.post("discs", dicom(), ContentType.DICOM).json()
    mask = np.asarray(Pillow.open(io.BytesIO(base64.b64decode(told["mask"]["data"]))))
    assert mask.shape == draw_pixels().shape
    counts = {name: int((mask == int(label)).sum()) for label, name in told["mask"]["labels"].items()}
    assert told["area_px"] == {name: count for name, count in counts.items() if name != "background"}
    assert told["area_mm2"] == {name: 4.0 * count for name, count in told["area_px"].items()}


def test_an_answer_is_a_row_and_no_row_names_a_subject(gateway, places):
    before = open_journal(places.var).last_seq("nodes", "east")
    told = gateway.post(body=CT, site="east", X_Subject="Mrs Example 1950").json()
    rows = open_journal(places.var).newest("nodes", "east", 1)
    assert open_journal(places.var).last_seq("nodes", "east") > before
    assert rows[0]["id"] == told["id"]
    assert rows[0]["image"] == hashlib.sha256(CT).hexdigest()
    assert "Example" not in json.dumps(rows[0], default=str)
    assert b"Example" not in (places.var / "journal.db").read_bytes()
    assert "Example" not in gateway.log.read_text()


def test_a_file_with_a_bad_header_is_not_quoted_in_the_log(gateway):
    body = dicom().replace(b"1.2.840.10008.1.2.1\0", b"Mrs Example 195001.\0")
    assert gateway.post(body=body, kind=ContentType.DICOM).status_code == 415
    assert "Example" not in gateway.log.read_text()


def nan():
    pixels = draw_pixels().astype(np.float32)
    pixels[3, 4] = np.nan
    return as_npy(pixels)


REFUSED = [
    ("truncated .npy", {"body": CT[:-20]}, 400, "unreadable"),
    ("truncated DICOM", {"body": dicom()[:700], "kind": ContentType.DICOM}, 400, "unreadable"),
    ("half a DICOM header", {"body": dicom()[:200], "kind": ContentType.DICOM}, 400, "unreadable"),
    ("half a NIfTI header", {"body": nifti()[:300], "kind": ContentType.NIFTI}, 400, "unreadable"),
    ("truncated NIfTI", {"body": nifti()[:-9], "kind": ContentType.NIFTI}, 400, "unreadable"),
    ("not a PNG", {"body": b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "kind": ContentType.PNG}, 400, "unreadable"),
    ("empty", {"body": b""}, 400, "unreadable"),
    ("a pickle", {"body": as_npy(np.array([{"a": 1}], dtype=object))}, 415, "wrong-type"),
    ("text", {"body": b"hello", "kind": "text/plain"}, 415, "wrong-type"),
    ("no content type", {"kind": None}, 415, "wrong-type"),
    ("form", {"kind": "multipart/form-data; boundary=x"}, 415, "wrong-type"),
    ("other shape", {"body": as_npy(np.zeros((31, 32), np.int16))}, 422, "wrong-shape"),
    ("a volume", {"body": as_npy(np.zeros((2, 32, 32), np.int16))}, 422, "wrong-shape"),
    ("other spacing", {"body": dicom(spacing=9.0), "kind": ContentType.DICOM}, 422, "wrong-shape"),
    ("other modality", {"body": dicom(Modality.MR), "kind": ContentType.DICOM}, 422, "wrong-modality"),
    ("NaN", {"body": nan()}, 422, "not-finite"),
    ("infinity", {"body": as_npy(np.full((32, 32), np.inf, np.float32))}, 422, "not-finite"),
    ("huge on paper", {"body": as_npy(np.zeros((1, 2), np.int16)).replace(b"(1, 2)", b"(99999, 99999)")},
     413, "too-large"),
    ("unknown task", {"task": "lung-nodul"}, 404, "unknown-task"),
    ("path in task", {"task": "..%2f..%2fetc"}, 404, "not-found"),
    ("unknown site", {"site": "harbor"}, 403, "unknown-site"),
    ("no site", {"site": None}, 400, "site-required"),
    ("site without approval", {"site": "harbour"}, 503, "not-approved"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "status", "name"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_bad_input_is_a_counted_problem_that_leaves_nothing(gateway, places, request_, status, name):
    counted, rows = (
        gateway.count("formulary_refusals_total", reason=name),
        open_journal(places.var).last_seq(),
    )
    response = gateway.post(**request_)
    told = response.json()
    assert (response.status_code, told["type"]) == (status, f"/problems/{name}"), told
    assert response.headers["content-type"] == "application/problem+json"
    assert set(told) == {"type", "title", "status", "detail", "request_id"}
    assert told["status"] == status
    assert len(told["detail"]) > 20
    assert told["request_id"] == response.headers["x-request-id"]
    assert ("retry-after" in response.headers) is (status == 503)
    assert gateway.count("formulary_refusals_total", reason=name) == counted + 1
    assert open_journal(places.var).last_seq() == rows
    assert not gateway.errors()
    assert gateway.post().status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_hundred_megabytes_are_refused_and_the_caller_reads_why(gateway, declared):
    block = b"\0" * 2**20
    body = block * 100 if declared else (block for _ in range(100))
    headers = {"Content-Type": NPY, "X-Site": "north"}
    response = gateway.client.post("/v1/models/nodes/predict", content=body, headers=headers)
    assert (response.status_code, response.json()["type"]) == (413, "/problems/too-large")
    assert gateway.post().status_code == 200


def test_a_caller_who_goes_away_in_the_middle_disturbs_nobody(gateway):
    def broken():
        yield CT[:100]
        raise ConnectionError

    for _ in range(5):
        with pytest.raises((ConnectionError, httpx.TransportError)):
            gateway.client.post(
                "/v1/models/nodes/predict", content=broken(), headers={"Content-Type": NPY, "X-Site": "north"}
            )
    assert gateway.post().status_code == 200
    assert not gateway.errors()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/models/nodes/predict", 405), ("POST", "/v1/models", 405), ("GET", "/etc/passwd", 404),
     ("POST", "/predict", 404), ("GET", "/schema.json", 404), ("GET", "/healthz", 404), ("DELETE", "/", 405)],
)  # fmt: skip
def test_what_is_not_a_route_is_a_problem_too(gateway, method, path, status):
    response = gateway.client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


def test_a_request_id_that_is_not_plain_is_replaced(gateway):
    told = gateway.post(X_Request_ID="a b<script>").json()
    assert re.fullmatch(r"[0-9a-f]{32}", told["request_id"])


def test_the_pages_are_there_and_need_no_network(gateway):
    assert gateway.client.get("/livez").text == "alive\n"
    assert gateway.client.get("/readyz").status_code == 200
    page = gateway.client.get("/docs").text
    assert "/v1/models/{task}/predict" in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


def test_the_openapi_document_names_every_route_and_every_answer_fits_it(gateway):
    document = gateway.client.get("/openapi.json").json()
    schema = document["components"]["schemas"]["Answer"]
    for task in ("discs", "nodes"):
        told = gateway.post(task).json()
        assert set(schema["required"]) <= set(told) <= set(schema["properties"])
    statuses = set(document["paths"]["/v1/models/{task}/predict"]["post"]["responses"])
    assert {str(status) for _, _, status, _ in REFUSED} | {"200"} <= statuses


def test_the_list_of_models_says_what_serves_where(gateway):
    told = gateway.client.get("/v1/models").json()
    rows = {row["task"]: row for row in told["models"]}
    assert set(rows) == {"discs", "nodes"}
    assert sorted(rows["nodes"]["sites"]) == ["east", "north"]
    assert rows["discs"]["version"] == 1
    assert tuple(rows["discs"]["shape"]) == draw_pixels().shape
