"""The OpenAPI document is true: whatever is asked, the answer is one that it names, as it says."""

import os
from collections import Counter

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from imaging.vocabulary import ContentType, Modality
from services.findings import encode
from services.keys import create_key
from tests.tiny_gateway import Gateway, draw_pixels

SOAK = bool(os.environ.get("FORMULARY_SOAK"))
CASES = 10_000 if SOAK else 500
pytestmark = pytest.mark.timeout(3600 if SOAK else 600)
CHECKS = [
    not_a_server_error, checks.response_schema_conformance, checks.status_code_conformance,
    checks.content_type_conformance, checks.response_headers_conformance,
]  # fmt: skip
ACCEPTS = ("*/*", "application/json", "application/json;mask=rle", "image/png", "application/x-nifti",
           "application/x-npy", "text/html")  # fmt: skip

for kind in ContentType:
    image = encode(draw_pixels(), kind, 2.0, Modality.CT, -1024.0)
    schemathesis.openapi.media_type(str(kind), st.just(image) | st.binary(max_size=400))


class Explorer:
    """Asks what the document allows and what it forbids; every answer is held to the document."""

    def __init__(self, gateway, credential):
        self.headers = {"Authorization": f"Bearer {credential}"}
        url = f"{gateway.client.base_url}/openapi.json"
        self.schema = schemathesis.openapi.from_url(url, headers=self.headers)
        self.schema.config.checks.not_a_server_error.expected_statuses = ["2xx", "3xx", "4xx", "503", "504"]
        self.told, self._jobs = Counter(), [self._finish_a_job(gateway)]

    def _finish_a_job(self, gateway):
        headers = {**self.headers, "X-Site": "north", "Content-Type": ContentType.NPY}
        volume = encode(np.stack([draw_pixels(1), draw_pixels(2)]), ContentType.NPY, 2.0, "")
        told = gateway.client.post("/v1/models/discs/volumes", content=volume, headers=headers)
        place = told.headers["location"]
        gateway.wait(lambda: gateway.client.get(place, headers=headers).json()["state"] == "done", 60)
        return told.json()["id"]

    def explore(self):
        """At least CASES cases, most of them of images and jobs; what takes no input is soon seen."""
        operations = [found.ok() for found in self.schema.get_all_operations()]
        shares = {one.label: 5 if one.path_parameters else bool(one.query or one.body) for one in operations}
        share = -(-CASES // sum(shares.values()))
        for operation in operations:
            self._ask(operation, 5 + share * shares[operation.label])
        assert sum(self.told.values()) >= CASES

    def _ask(self, operation, count):
        cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in GenerationMode])

        @settings(max_examples=count, derandomize=not SOAK, deadline=None, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=cases, accept=st.sampled_from(ACCEPTS), real=st.sampled_from((True, True, False)))
        def ask(case, accept, real):
            if real:
                self._name(case)
            headers = self.headers | {"Accept": accept}
            answer = case.call(headers=headers, allow_redirects=False, timeout=60)
            self.told[operation.label, answer.status_code] += 1
            if answer.status_code == 202 and case.method == "POST":
                self._jobs.append(answer.json()["id"])
            case.validate_response(answer, checks=CHECKS)

        ask()

    def _name(self, case):
        """Names that there are, which nobody would draw; the first job is never cancelled."""
        if "number" in case.path_parameters and (case.method == "GET" or self._jobs[1:]):
            mine = self._jobs[0] if case.method == "GET" else self._jobs.pop()
            case.path_parameters["number"] = mine
        if case.operation.headers:
            case.headers["X-Site"] = "north"
        for asked in (case.body, case.query):
            if isinstance(asked, dict) and "task" in asked:
                asked["task"] = "nodes"


def test_what_anybody_asks_is_answered_as_the_document_says(apart, token):
    with Gateway(apart) as gateway:
        explorer = Explorer(gateway, token)
        explorer.explore()
        assert not gateway.errors()


def test_so_it_is_with_access_control_on(apart):
    _, key = create_key(apart, "north", 90, "ada")
    with Gateway(apart, FORMULARY_ACCESS="on") as gateway:
        explorer = Explorer(gateway, key)
        explorer.explore()
        assert not gateway.errors()
