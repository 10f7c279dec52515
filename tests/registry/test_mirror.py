"""MLflow shows what the ledger says, and nothing that is done to MLflow decides anything."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from imaging.config import Places
from imaging.errors import RegistryError, TrustError
from imaging.vocabulary import Decision, Kind, Statement
from registry.access import admit
from registry.evidence import digest_statements, sign_statements
from registry.guardian import HEADER, Promoter, read_secret
from registry.ledger import open_ledger
from registry.mirror import drain, expected_aliases, mirror_versions
from registry.package import FILES, digest_package, shelf, shelve, write_contract
from registry.store import mirroring, open_store, server_command
from services.stack import free_port
from tests.tiny import ROOT, promise

TASK = "brain-tissue"
SET = "sha256:" + "1" * 64
SCORE = {"estimate": 0.9, "low": 0.85, "high": 0.95, "subjects": 100}


def evaluate(digest):
    cell = {"family": "noise", "group": "seen", "severity": 3, "drop": SCORE, "value": SCORE}
    robustness = {"score": "dice", "cells": [cell], "groups": {"held_out": {"cells": 1, "drop": SCORE}}}
    return {"package": digest, "sets": {"test": {"digest": SET, "images": 800, "subjects": 400}},
            "overall": {"dice": SCORE}, "sites": {"north": {"dice": SCORE}},
            "subgroups": {"age_band": {"75+": {"dice": SCORE}}}, "robustness": robustness}  # fmt: skip


class Registry:
    """A ledger with small signed packages, decided about by events as the registry's functions write them."""

    def __init__(self, root, digests=()):
        self.places = Places(root=root, build=root / "build", var=root / "var")
        self.ledger = open_ledger(self.places.var)
        self.author = admit(self.places.var, self.ledger, "author@test")
        self.approver = admit(self.places.var, self.ledger, "approver@test")
        self.digests = dict(digests)
        self.say("revert")

    def say(self, foreign_alias):
        bounds = {"subjects": 1, "low": {"dice": 0.8}, "margin": {"dice": 0.05}}
        policy = {"task": TASK, "why": "A test.", "primary": "dice", "network": bounds, "internal": bounds,
                  "external": bounds, "statements": ["evaluation"],
                  "foreign_alias": foreign_alias}  # fmt: skip
        self.places.policies.mkdir(parents=True, exist_ok=True)
        (self.places.policies / f"{TASK}.yaml").write_text(yaml.safe_dump(policy))

    def register(self):
        """One more version; its number."""
        number = len(self.digests) + 1
        source = self.places.build / f"v{number}"
        source.mkdir(parents=True)
        for name in FILES:
            (source / name).write_text(f"{number} {name}")
        told = {"intended_use": "Reads drawn discs.", "simulated": "Everything is drawn."}
        write_contract(promise(Kind.SEGMENTATION, task=TASK, title="Discs", **told), source)
        digest = self.digests[number] = digest_package(source)
        made = {"task": TASK, "commit": f"c0ffee{number}", "modified": False, "dvc_lock": "absent",
                "stages": {}, "environment": {"requirements": "sha256:2"}, "params": {"fit": {"epochs": 2}},
                "history": {"epochs": [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]}}  # fmt: skip
        package = shelve(source, self.places.var)
        sign_statements(
            package, {Statement.PACKAGE: made, Statement.EVALUATION: evaluate(digest)}, self.author
        )
        self.write(Decision.REGISTERED, number, self.author, evidence=digest_statements(package))
        return number

    def write(self, kind, number, signer, queued=(), **body):
        with self.ledger.writing() as writer:
            event = writer.append(
                kind, TASK, {"version": number, "digest": self.digests[number], **body}, signer
            )
            for site in queued:
                writer.queue(event, site, number)
        return event

    def approve(self, number, *sites):
        passed = {"passed": True, "reasons": ["dice lower bound 0.85 reaches 0.8"]}
        failed = {"passed": False, "reasons": ["dice rests on 3 subjects"]}
        verdict = {"network": passed, "sites": dict.fromkeys(sites, passed) | {"harbour": failed}}
        asked = self.write(Decision.REQUESTED, number, self.author, sites=list(sites), verdict=verdict)
        told = {"sites": list(sites), "asked": asked.seq, "because": "A test."}
        self.write(Decision.APPROVED, number, self.approver, ["*", *sites], **told)

    def challenge(self, number, *sites):
        self.write(Decision.CHALLENGED, number, self.author, sites, sites=list(sites), because="A test.")

    def drain(self):
        return drain(self.places, self.ledger)

    def client(self):
        return open_store(self.places.var)

    def aliases(self):
        held = self.client().get_registered_model(TASK).aliases
        return {alias: int(number) for alias, number in held.items()}  # text over HTTP

    def incidents(self):
        return [event.body["fact"] for event in self.ledger.events(TASK, Decision.INCIDENT)]


@pytest.fixture(autouse=True, scope="module")
def local():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow sets them; this puts them back
        patch.setenv("MLFLOW_REGISTRY_URI", "")
        yield


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path)


@pytest.fixture(scope="module")
def drained(tmp_path_factory):
    """Version 2 serves at two sites, 1 before it, and MLflow knows it."""
    registry = Registry(tmp_path_factory.mktemp("drained"))
    for number in (1, 2):
        registry.register()
        registry.approve(number, "north", "east")
    registry.drain()
    return registry


@pytest.fixture
def serving(drained, tmp_path):
    """A copy; MLflow's artefacts stay where they were logged."""
    shutil.copytree(drained.places.root, tmp_path / "copy")
    return Registry(tmp_path / "copy", drained.digests)


WANTED = {"champion": 2, "champion--east": 2, "champion--north": 2,
          "previous": 1, "previous--east": 1, "previous--north": 1}  # fmt: skip


def test_every_slot_of_the_network_and_of_each_site_is_an_alias(serving):
    assert expected_aliases(serving.ledger, TASK) == WANTED
    assert serving.aliases() == WANTED
    serving.register()
    serving.approve(3, "north")
    serving.challenge(3, "east")
    assert serving.ledger.pending()
    assert sorted(serving.drain()) == [
        "brain-tissue@challenger--east = v3", "brain-tissue@champion = v3",
        "brain-tissue@champion--north = v3", "brain-tissue@previous = v2",
        "brain-tissue@previous--north = v2",
    ]  # fmt: skip
    assert serving.aliases() == expected_aliases(serving.ledger, TASK)
    assert not serving.ledger.pending()
    assert not serving.drain()
    assert not serving.incidents()


def test_a_person_who_only_knows_mlflow_finds_evidence_verdict_and_approver(serving):
    client = serving.client()
    version = client.get_model_version(TASK, "2")
    assert version.description == (
        "Reads drawn discs. Research use only; simulated sites. Everything is drawn."
    )
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    for tags in (version.tags, model.tags):
        assert tags["package_digest"] == serving.digests[2]
        assert tags["cohort.test"] == SET
        assert tags["commit"] == "c0ffee2"
        assert tags["gate.network"] == "passed: dice lower bound 0.85 reaches 0.8"
        assert tags["gate.site.harbour"] == "refused: dice rests on 3 subjects"
        assert tags["approver"] == "approver@test"
        assert tags["status"] == "champion: network, champion: north, champion: east"
    run = client.get_run(version.run_id)
    assert run.data.metrics["overall.dice.low"] == 0.85
    assert run.data.metrics["subgroup.age_band.75 or more.dice"] == 0.9
    assert run.data.metrics["robustness.held_out.drop.high"] == 0.95
    (noise,) = client.get_metric_history(version.run_id, "robustness.noise.drop")
    assert (noise.step, noise.value) == (3, 0.9)
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("test", "1" * 36)
    (overall,) = [metric for metric in model.metrics if metric.key == "overall.dice"]
    assert (overall.dataset_name, overall.dataset_digest) == ("test", "1" * 36)
    assert run.outputs.model_outputs[0].model_id == model.model_id
    serving.write(Decision.SUSPENDED, 2, serving.author, sites=["north"], because="A test.")
    serving.drain()
    status = client.get_model_version(TASK, "2").tags["status"]
    assert status == "champion: network, champion: north (suspended), champion: east"


@pytest.mark.parametrize(
    ("alias", "number", "fact"),
    [
        ("champion--north", "1", "champion--north of brain-tissue points at v1; the ledger says v2"),
        ("champion", None, "champion of brain-tissue points at nothing; the ledger says v2"),
        ("challenger--east", "1", "challenger--east of brain-tissue points at v1; the ledger says nothing"),
        ("Champion", "1", "Champion of brain-tissue points at v1; the ledger says nothing"),
        ("champion-of-mine", "2", "champion-of-mine of brain-tissue points at v2; the ledger says nothing"),
    ],
)
def test_a_foreign_alias_is_an_incident_and_put_right_at_the_next_poll(serving, alias, number, fact):
    client, before = serving.client(), serving.ledger.champions(TASK)
    client.set_registered_model_alias(TASK, "tried-by-somebody", "1")
    for count in (1, 2):  # done again, it is another incident
        if number:
            client.set_registered_model_alias(TASK, alias, number)
        else:
            client.delete_registered_model_alias(TASK, alias)
        assert serving.ledger.champions(TASK) == before, "MLflow decides nothing"
        assert serving.drain()[-1] == f"MLflow's alias {fact}. It was put right."
        assert serving.incidents() == [f"MLflow's alias {fact}."] * count
        assert serving.aliases() == WANTED | {"tried-by-somebody": 1}
        assert not serving.drain()
    assert serving.ledger.verify()


def test_a_policy_may_leave_a_foreign_alias_and_it_is_told_at_each_poll_and_recorded_once(serving):
    serving.say("report")
    before = serving.ledger.champions(TASK)
    serving.client().set_registered_model_alias(TASK, "champion", "1")
    for _ in range(3):
        (told,) = serving.drain()
        assert told.endswith("points at v1; the ledger says v2. It was left so.")
    assert len(serving.incidents()) == 1
    assert serving.aliases() == WANTED | {"champion": 1}
    assert serving.ledger.champions(TASK) == before
    serving.client().set_registered_model_alias(TASK, "champion", "2")
    assert not serving.drain()
    serving.client().set_registered_model_alias(TASK, "champion", "1")
    assert serving.drain()
    assert len(serving.incidents()) == 2, "mended and done again"


def test_a_move_that_mlflow_has_not_seen_is_no_incident_but_a_version_without_a_slot_is(serving):
    serving.register()
    mirror_versions(serving.places, serving.ledger, TASK)
    serving.approve(3, "north")
    serving.client().set_registered_model_alias(
        TASK, "champion", "3"
    )  # a drain that was killed before it settled
    serving.drain()
    assert not serving.incidents()
    serving.register()
    mirror_versions(serving.places, serving.ledger, TASK)
    serving.client().set_registered_model_alias(TASK, "champion", "4")
    serving.approve(2, "north")
    serving.drain()
    assert serving.incidents() == [
        "MLflow's alias champion of brain-tissue points at v4; the ledger says v2."
    ]
    assert serving.aliases() == expected_aliases(serving.ledger, TASK)


def test_a_deleted_version_behind_an_alias_is_an_incident_and_made_anew(serving):
    client = serving.client()
    run = client.get_model_version(TASK, "2").run_id
    client.set_registered_model_alias(TASK, "tried-by-somebody", "1")
    client.delete_model_version(TASK, "1")
    client.delete_model_version(TASK, "2")
    told = serving.drain()
    assert told[-2:] == [
        f"MLflow does not hold brain-tissue v{n} any more. It was put right." for n in (1, 2)
    ]
    assert serving.aliases() == WANTED
    assert client.get_model_version(TASK, "2").tags["package_digest"] == serving.digests[2]
    assert client.get_model_version(TASK, "2").tags["approver"] == "approver@test"
    assert client.get_run(run), "runs stay"
    assert len(serving.incidents()) == 2
    assert not serving.drain()


def test_what_mlflow_still_holds_is_not_logged_again_when_a_gap_is_filled(serving):
    client = serving.client()
    client.set_registered_model_alias(TASK, "tried-by-somebody", "2")
    kept = client.get_model_version(TASK, "2")
    client.delete_model_version(TASK, "1")
    assert mirror_versions(serving.places, serving.ledger, TASK) == [1]
    made = client.get_model_version(TASK, "2")
    assert (made.run_id, made.source) == (kept.run_id, kept.source)
    assert serving.aliases() == WANTED | {"tried-by-somebody": 2}


def test_nothing_is_taken_away_to_fill_a_gap_while_a_package_does_not_hold(serving):
    serving.client().delete_model_version(TASK, "1")
    package = shelf(serving.places.var, serving.digests[2])
    (package / "model.onnx").write_text("tampered")
    with pytest.raises(TrustError, match=r"model\.onnx"):
        serving.drain()
    assert serving.aliases()["champion"] == 2


def test_a_deleted_version_is_told_with_what_to_do_where_the_policy_leaves_things(serving):
    serving.say("report")
    serving.client().delete_model_version(TASK, "1")
    for _ in range(2):
        with pytest.raises(RegistryError, match=r"v1 any more\. It was left so\. .*no number") as raised:
            serving.drain()
        assert "foreign_alias: revert" in raised.value.fix
    assert len(serving.incidents()) == 1
    serving.say("revert")
    serving.drain()
    assert serving.aliases() == WANTED


def test_a_deleted_version_that_had_no_alias_is_noticed_when_its_number_is_gone(serving):
    serving.register()
    serving.drain()
    serving.client().delete_model_version(TASK, "3")
    serving.drain()
    assert sorted(serving.client().get_registered_model(TASK).aliases) == sorted(WANTED)
    assert serving.client().get_model_version(TASK, "3").tags["package_digest"] == serving.digests[3]
    assert "MLflow does not hold brain-tissue v3 any more." in serving.incidents()


def test_a_strangers_version_is_told_and_gives_way_to_the_ledgers(serving):
    client = serving.client()
    stranger = client.create_model_version(TASK, "file:///tmp/a-model")
    assert stranger.version == 3
    assert serving.drain() == [
        "MLflow holds brain-tissue v3, which the ledger does not know. It was left so."
    ]
    serving.register()
    serving.drain()
    assert client.get_model_version(TASK, "3").tags["package_digest"] == serving.digests[3]
    assert serving.aliases() == WANTED
    assert len(serving.incidents()) == 1


def test_another_package_under_our_number_is_refused(serving):
    stranger = {"package_digest": "sha256:other"}
    serving.client().create_model_version(TASK, "file:///tmp/a-model", tags=stranger)
    serving.register()
    serving.client().set_registered_model_alias(TASK, "champion", "1")
    serving.say("report")
    with pytest.raises(RegistryError, match="v3 no number any more: it is gone or another's"):
        serving.drain()
    assert "MLflow holds another package as brain-tissue v3." in serving.incidents()
    serving.say("revert")
    serving.drain()
    assert serving.client().get_model_version(TASK, "3").tags["package_digest"] == serving.digests[3]
    assert serving.aliases() == WANTED


@pytest.mark.parametrize("digest", ["sha256:other", None])
def test_a_changed_digest_is_put_back_and_hinders_no_move(serving, digest):
    client, kept = serving.client(), serving.client().get_model_version(TASK, "2")
    if digest:
        client.set_model_version_tag(TASK, "2", "package_digest", digest)
    else:
        client.delete_model_version_tag(TASK, "2", "package_digest")
    client.set_registered_model_alias(TASK, "champion", "1")
    client.set_registered_model_alias(TASK, "challenger", "1")
    assert len([told for told in serving.drain() if told.endswith("It was put right.")]) == 3 - (not digest)
    made = client.get_model_version(TASK, "2")
    assert (made.run_id, made.tags["package_digest"]) == (kept.run_id, serving.digests[2])
    assert any("brain-tissue v2" in fact for fact in serving.incidents())
    assert serving.aliases() == WANTED
    assert not serving.drain()


def test_a_lost_model_is_filled_again(serving):
    serving.client().delete_registered_model(TASK)
    assert mirror_versions(serving.places, serving.ledger, TASK) == [1, 2]
    assert serving.aliases() == WANTED


def test_two_mirrors_wait_for_each_other(registry):
    registry.register()
    logged = []
    with mirroring(registry.places.var):
        other = threading.Thread(
            target=lambda: logged.extend(mirror_versions(registry.places, registry.ledger, TASK))
        )
        other.start()
        time.sleep(0.5)
        assert not logged
    other.join(60)
    assert logged == [1]


def test_the_promoters_secret_is_made_once_and_private(tmp_path):
    secret = read_secret(tmp_path)
    assert read_secret(tmp_path) == secret
    (path,) = (tmp_path / "keys").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert not Promoter().in_context()


class Server:
    """What `formulary registry serve` starts, as a child process; it is ended by its id."""

    def __init__(self, places):
        self._places, self.port = places, free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        places = {"FORMULARY_ROOT": str(self._places.root), "FORMULARY_VAR": str(self._places.var)}
        environment = {**os.environ, **places, "PATH": path, "PYTHONPATH": str(ROOT)}
        with (self._places.var / "server.log").open("ab") as log:
            self._process = subprocess.Popen(server_command(self._places.var, self.port), env=environment,
                                             stdout=log, stderr=log, start_new_session=True)  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.address}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        self.__exit__()
        raise AssertionError((self._places.var / "server.log").read_text()[-3000:])

    def __exit__(self, *_):
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


PLAIN = """
import json, sys, mlflow
from mlflow.exceptions import MlflowException
address, task = sys.argv[1:]
mlflow.set_tracking_uri(address); mlflow.set_registry_uri(address)
c = mlflow.MlflowClient()
refused = {}
for name, call in {
    "set": lambda: c.set_registered_model_alias(task, "champion--north", "1"),
    "add": lambda: c.set_registered_model_alias(task, "challenger", "1"),
    "write otherwise": lambda: c.set_registered_model_alias(task, "Champion", "1"),
    "digest": lambda: c.set_model_version_tag(task, "1", "package_digest", "sha256:other"),
    "no digest": lambda: c.delete_model_version_tag(task, "1", "package_digest"),
    "remove": lambda: c.delete_registered_model_alias(task, "previous"),
    "delete version": lambda: c.delete_model_version(task, "1"),
    "delete model": lambda: c.delete_registered_model(task),
    "rename model": lambda: c.rename_registered_model(task, "other"),
}.items():
    try:
        call(); refused[name] = "done"
    except MlflowException as error:
        refused[name] = f"{error.get_http_status_code()} {error.message}"
mlflow.set_experiment("mine")
with mlflow.start_run() as run:
    mlflow.log_metric("loss", 0.5); mlflow.log_param("a", 1)
c.set_registered_model_alias(task, "mine", "1"); c.delete_registered_model_alias(task, "mine")
c.set_registered_model_alias(task, "tried", "1"); c.set_model_version_tag(task, "1", "seen", "yes")
c.create_registered_model("my-model")
metrics = c.get_run(run.info.run_id).data.metrics
print(json.dumps([refused, len(c.search_model_versions(f"name='{task}'")), metrics]))
"""


def ask(server, way, path, body, **given):
    return httpx.request(way, server.address + path, json={"name": TASK, **body}, **given)


def median_ms(call, count=60):
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def test_the_server_moves_slots_for_the_mirror_alone_and_a_stopped_one_is_caught_up_with(
    serving, tmp_path, monkeypatch
):
    with Server(serving.places) as server:
        (tmp_path / "plain.py").write_text(PLAIN)
        done = subprocess.run([sys.executable, str(tmp_path / "plain.py"), server.address, TASK], text=True,
                              capture_output=True, check=True, cwd=tmp_path)  # fmt: skip
        refused, versions, metrics = json.loads(done.stdout.splitlines()[-1])
        assert all(told.startswith("403 ") for told in refused.values()), refused
        assert all("`formulary registry ...`" in told for told in refused.values())
        assert (versions, metrics) == (2, {"loss": 0.5})
        assert serving.aliases() == WANTED | {"tried": 1}
        check_routes(server)
        serving.register()
        serving.approve(3, "north")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        assert "brain-tissue@champion = v3" in serving.drain()
        assert not serving.incidents()
    serving.approve(2, "north")
    with pytest.raises(RegistryError, match="does not answer"):
        serving.drain()
    assert serving.ledger.pending()
    with Server(serving.places) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        assert "brain-tissue@champion = v2" in serving.drain()
        assert not serving.ledger.pending()
        assert serving.aliases() == expected_aliases(serving.ledger, TASK) | {"tried": 1}


def check_routes(server):
    """Both prefixes, a forged secret, loopback only; GraphQL can change nothing of the registry."""
    move = {"alias": "champion", "version": "1"}
    for prefix in ("/api/2.0/mlflow", "/ajax-api/2.0/mlflow"):
        for way, path, body in (
            ("POST", "registered-models/alias", move),
            ("POST", "registered-models/alias", {"alias": "champion-2", "version": "1"}),
            ("DELETE", "registered-models/alias", {"alias": "previous"}),
            ("POST", "model-versions/set-tag", {"version": "1", "key": "package_digest", "value": "x"}),
            ("DELETE", "model-versions/delete", {"version": "1"}),
            ("DELETE", "registered-models/delete", {}),
            ("POST", "registered-models/rename", {"new_name": "other"}),
        ):
            answer = ask(server, way, f"{prefix}/{path}", body)
            assert (answer.status_code, answer.json()["error_code"]) == (403, "PERMISSION_DENIED"), path
    alias = "/api/2.0/mlflow/registered-models/alias"
    assert ask(server, "POST", alias, move, headers={HEADER: "x" * 64}).status_code == 403
    twice = httpx.post(server.address + alias, json=json.dumps({"name": TASK, **move}))
    assert twice.status_code == 403, "MLflow takes JSON in JSON"
    query = {"query": "{ __schema { mutationType { fields { name } } } }"}
    told = httpx.post(f"{server.address}/graphql", json=query).json()
    fields = told["data"]["__schema"]["mutationType"]["fields"]
    searches = {"mlflowSearchRuns", "mlflowSearchDatasets", "testMutation"}  # the last one is an echo
    assert {field["name"] for field in fields} == searches
    bound = [
        c.laddr.ip for c in psutil.net_connections() if c.status == "LISTEN" and c.laddr.port == server.port
    ]
    assert bound == ["127.0.0.1"]
    search = "/api/2.0/mlflow/registered-models/search"
    for name, call in {"read": lambda: httpx.get(server.address + search),
                       "refused": lambda: ask(server, "POST", alias, move)}.items():  # fmt: skip
        print(f"{name}: {median_ms(call):.1f} ms a request")
