"""A promoted version leaves as a Bento that serves without the checkout, in a container, in Kubernetes."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import httpx
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from imaging.config import Places
from imaging.errors import ConfigError, DataError, NotApproved, Refused, TrustError
from imaging.vocabulary import Kind, Modality
from registry.access import Acting, admit
from registry.ledger import open_ledger
from registry.package import shelf
from services.commands import services
from services.findings import encode
from services.release import ARCHIVE, Release, build_release, choose, pin_requirements, unpack_release
from services.stack import free_port
from tests.tiny import promote, train, train_another, write_root
from tests.tiny_gateway import NPY, Gateway, draw_pixels

SOAK = bool(os.environ.get("FORMULARY_SOAK"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkout of two tasks; only one of them is released."""
    root = tmp_path_factory.mktemp("release")
    places = write_root(root, nodes=Kind.CLASSIFICATION, others=Kind.CLASSIFICATION)
    for task in ("nodes", "others"):
        promote(places, task, train(places, task))
    return places


def act(places):
    ledger = open_ledger(places.var)
    return Acting(places, ledger, admit(places.var, ledger, "author@test"), "A test.")


def make_release(places, folder, profile="cpu"):
    acting = act(places)
    number, digest, packages = choose(acting, "nodes", None, None)
    return build_release(acting, Release("nodes", number, digest, tuple(packages), folder, profile))


@pytest.fixture(scope="module")
def released(places, tmp_path_factory):
    """As the command makes it."""
    folder = tmp_path_factory.mktemp("released") / "out"
    told = CliRunner(env={"FORMULARY_ROOT": str(places.root), "FORMULARY_VAR": str(places.var)}).invoke(
        services,
        ["release", "nodes", "--site", "north", "--out", str(folder), "--identity", "author@test"],
        catch_exceptions=False,
    )
    assert told.exit_code == 0, told.output
    return folder


@pytest.fixture(scope="module")
def interpreter(released, tmp_path_factory):
    """A Python that has packages and not this checkout; in the soak, only those that the release lists."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=SOAK)
    python = folder / "bin" / "python"
    if SOAK:
        listed = released / "bento" / "src" / "requirements.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-r", listed], check=True)
    else:
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "all.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import importlib.util as u; print(u.find_spec('services'), u.find_spec('bentoml') is not None)"
    told = subprocess.check_output([python, "-c", code], cwd=folder, text=True, env={})
    assert told.split() == ["None", "True"]
    return python


def ask(address, **headers):
    body = encode(draw_pixels(), NPY, 2.0, Modality.CT)
    headers = {"Content-Type": NPY, "X-Site": "north", **headers}
    return httpx.post(f"{address}/v1/models/nodes/predict", content=body, headers=headers, timeout=60)


def read_answer(response):
    body = response.json()
    assert response.status_code == 200, body
    return {name: body[name] for name in ("version", "package", "engine", "probabilities", "positive")}


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_bento_answers_elsewhere_what_the_gateway_answers_here(
    places, released, interpreter, tmp_path, profile
):
    shutil.copytree(released / "bento", tmp_path / "bento")
    port, empty = free_port(), tmp_path / "empty"
    empty.mkdir()
    environment = {
        "PATH": os.defpath, "HOME": str(empty), "OMP_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "true",
        "FORMULARY_PROFILE": profile, "FORMULARY_DEVICES": "cpu:0",
    }  # fmt: skip
    command = [interpreter, "-m", "bentoml", "serve", tmp_path / "bento", "--port", str(port)]
    with Gateway(places) as gateway, (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=empty, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            gateway.wait(lambda: is_ready(address), 120)
            assert read_answer(ask(address)) == read_answer(gateway.post())
            assert ask(address, **{"X-Site": "harbour"}).json()["type"] == "/problems/not-approved"
        finally:
            process.terminate()
            process.wait(timeout=60)
    assert "Traceback" not in (tmp_path / "log").read_text()


def is_ready(address):
    try:
        return httpx.get(f"{address}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_it_holds_what_serving_needs_and_nothing_else(places, released):
    source = released / "bento" / "src"
    assert not [
        path for path in source.rglob("*") if path.name in ("tests", "training", "benchmarks", "build")
    ]
    assert not list(source.rglob("*.key"))
    assert list(yaml.safe_load((source / "params.yaml").read_text())["tasks"]) == ["nodes"]
    digest = open_ledger(places.var).champions("nodes")["north"].digest.removeprefix("sha256:")
    with tarfile.open(source / ARCHIVE) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if name.startswith("packages/")}
    assert folders == {digest, f"{digest}.statements"}
    labels = yaml.safe_load((released / "bento" / "bento.yaml").read_text())["labels"]
    assert labels == {"task": "nodes", "version": "1", "digest": f"sha256-{digest}", "profile": "cpu"}


def test_the_ledger_tells_that_it_left(places, released):
    (event,) = open_ledger(places.var).events("nodes", "exported")
    assert (event.body["what"], event.body["version"], event.actor) == ("release nodes-v1", 1, "author@test")


def test_what_serving_needs_is_pinned_as_the_lock_pins_it(released):
    root = Path(__file__).parents[2]
    lock = set((root / "requirements.lock").read_text().splitlines())
    listed = (released / "bento" / "src" / "requirements.txt").read_text().splitlines()
    assert set(listed) <= lock
    names = {line.split("==")[0].lower() for line in listed}
    assert {"bentoml", "openvino", "onnxruntime", "uvicorn", "pydicom", "anyio"} <= names
    assert not names & {"mlflow", "evidently", "great-expectations", "dvc", "monai", "torch"}


def test_a_lock_without_something_that_serving_needs_is_refused():
    with pytest.raises(ConfigError, match="no numpy"):
        pin_requirements(["pydantic==1.0"], ("numpy",))


def test_what_a_cuda_build_of_torch_brings_by_its_own_pins_is_left_to_it(monkeypatch):
    told = {"torch": ["triton==3.7.0; platform_system == 'Linux'", "sympy>=1.13", "setuptools"], "sympy": []}
    monkeypatch.setattr("services.release.requires", told.get)
    lock = ["torch==2.13.0", "sympy==1.14.0"]
    assert pin_requirements(lock, ("torch",)) == ["sympy==1.14.0", "torch==2.13.0"]
    told["numpy"] = ["triton"]
    with pytest.raises(ConfigError, match="no triton"):
        pin_requirements([*lock, "numpy==2.0"], ("numpy",))


def test_a_changed_package_is_not_served_from_a_release(places, released, tmp_path):
    source = tmp_path / "src"
    shutil.copytree(released / "bento" / "src", source)
    with tarfile.open(source / ARCHIVE) as archive:
        archive.extractall(tmp_path / "taken")
    events = (tmp_path / "taken" / "events.jsonl").read_text()
    (tmp_path / "taken" / "events.jsonl").write_text(events.replace("author@test", "another@test", 1))
    with tarfile.open(source / ARCHIVE, "w") as archive:
        for path in sorted((tmp_path / "taken").iterdir()):
            archive.add(path, path.name)
    with pytest.raises(TrustError):
        unpack_release(Places(source, source / "build", source / "var"))


def test_a_release_is_unpacked_once_and_again_without_harm(released, tmp_path):
    source = tmp_path / "src"
    shutil.copytree(released / "bento" / "src", source)
    places = Places(source, source / "build", source / "var")
    for _ in range(2):
        unpack_release(places)
    ledger = open_ledger(places.var)
    ledger.verify()
    assert shelf(places.var, ledger.champions("nodes")["north"].digest).is_dir()


def test_only_what_serves_is_released_and_never_over_something(places, released):
    acting = act(places)
    with pytest.raises(NotApproved, match="at harbour"):
        choose(acting, "nodes", None, "harbour")
    with pytest.raises(Refused, match="serves nowhere"):
        choose(acting, "nodes", train_another(places, 400), None)
    with pytest.raises(DataError, match="not empty"):
        make_release(places, released)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def files(request, places, released, tmp_path_factory):
    if request.param == "cpu":
        return request.param, released
    return request.param, make_release(places, tmp_path_factory.mktemp("gpu") / "out", "gpu")


def test_the_kubernetes_files_hold_to_the_schema_of_every_served_release(files):
    profile, folder = files
    kinds = {}
    for path in sorted((folder / "kubernetes").iterdir()):
        for document in yaml.safe_load_all(path.read_text()):
            for release in ("1.30", "1.32", "1.34"):
                kubernetes_validate.validate(document, release, strict=True)
            kinds[document["kind"]] = document
    assert set(kinds) == {"Service", "NetworkPolicy", "PodDisruptionBudget", "StatefulSet"}
    policy = kinds["NetworkPolicy"]["spec"]
    assert (policy["egress"], set(policy["policyTypes"])) == ([], {"Ingress", "Egress"})
    pod = kinds["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    for container in [*pod["containers"], *pod["initContainers"]]:
        assert container["securityContext"]["readOnlyRootFilesystem"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu", 0) == (profile == "gpu")
    assert json.dumps(kinds).count("nodes-v1") == 1


def test_a_misspelt_field_would_be_found(files):
    (document,) = yaml.safe_load_all((files[1] / "kubernetes" / "statefulset.yaml").read_text())
    document["spec"]["replica"] = document["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(document, "1.32", strict=True)


def test_the_container_runs_as_nobody_and_serves_what_is_beside_it(files):
    profile, folder = files
    lines = (folder / "container" / "Dockerfile").read_text().splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 10001:10001"]
    copied = [line.split()[1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    assert all((folder / path).exists() for path in copied)
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    assert f"FORMULARY_PROFILE={profile}" in "\n".join(lines)
    entry = json.loads(
        next(line for line in lines if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT")
    )
    argument = json.loads(next(line for line in lines if line.startswith("CMD")).removeprefix("CMD"))
    told = subprocess.run([sys.executable, *entry[1:], *argument, "--help"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
