"""What is there is documented, and what is documented is there."""

import importlib
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import click
import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
DEPARTMENTS = ("imaging", "registry", "monitoring", "training", "services")
NOT_MODULES = {"__init__", "env"}


def modules(department: str) -> set[str]:
    found = {path for path in (ROOT / department).rglob("*.py") if "versions" not in path.parts}
    return {path.stem for path in found} - NOT_MODULES


@pytest.mark.parametrize("department", DEPARTMENTS)
def test_every_module_stands_on_its_departments_page(department):
    page = (ROOT / "docs" / f"{department}.md").read_text()
    told = set(re.findall(r"^[-|] *`(\w+)(?:\.py)?`", page, re.MULTILINE))
    assert modules(department) <= told, f"not on docs/{department}.md: {modules(department) - told}"
    assert told <= modules(department), f"docs/{department}.md names no module: {told - modules(department)}"


def commands(command: click.Command, path: str):
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), f"{path} {name}")
    else:
        yield path, command


def every_command():
    return list(commands(importlib.import_module("formulary").door, "formulary"))


def test_every_command_option_and_argument_is_explained():
    for path, command in every_command():
        assert command.help, f"{path} has no help"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{path} {parameter.opts}: no help"
            else:
                assert parameter.name.upper() in command.help, f"{path}: {parameter.name} is not explained"


def test_every_list_command_speaks_json():
    listing = [
        (p, c)
        for p, c in every_command()
        if p.split()[-1] in ("list", "history", "verdicts", "journal", "show")
    ]
    assert len(listing) >= 5
    for path, command in listing:
        assert any("--json" in parameter.opts for parameter in command.params), path


def test_the_front_door_imports_no_department():
    code = f"import sys, formulary; print([m for m in sys.modules if m.split('.')[0] in {DEPARTMENTS}])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_decisions_that_matter_most_are_written_down():
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert len(pages) >= 5
    for page in pages:
        text = page.read_text()
        assert all(f"## {part}" in text for part in ("Context", "Decision", "Consequence")), page.name


def test_every_benchmark_can_be_quick_and_speak_json():
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    (run,) = re.findall(r"for one in (.+); do", (ROOT / "Makefile").read_text())
    assert sorted(run.split()) == [script.stem for script in scripts]
    for script in scripts:
        text = script.read_text()
        assert "--quick" in text, script.name
        assert "--json" in text, script.name


def test_the_serving_benchmark_asks_every_peer():
    told = (ROOT / "benchmarks" / "peers" / "servers.py").read_text()
    helpers = {"client", "machine", "model", "packages", "servers"}
    peers = {path.stem for path in (ROOT / "benchmarks" / "peers").glob("*.py")} - helpers
    assert len(peers) >= 7
    assert not {name for name in peers if name not in told}


def test_no_package_is_pinned_twice():
    lines = [line for path in ROOT.glob("requirements*.lock") for line in path.read_text().splitlines()]
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")]
    assert len(names) == len(set(names))


def test_pins_stand_only_in_the_locks():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert "==" not in pyproject
    lock = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!_]+", line) for line in lock), (
        "exact pins, no local builds"
    )
    assert "torch==2.13.0" in lock


def test_every_pinned_version_takes_the_oldest_python_that_is_promised():
    lines = [line for path in ROOT.glob("requirements*.lock") for line in path.read_text().splitlines()]
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line and not line.startswith("#")}
    installed = [d for d in distributions() if d.metadata["Name"].lower() in pinned]
    told = {d.metadata["Name"]: d.metadata.get("Requires-Python") or "" for d in installed}
    assert len(told) > 200
    assert not {name: asked for name, asked in told.items() if "3.11.0" not in SpecifierSet(asked)}


def test_the_demo_says_what_is_simulated():
    readme = (ROOT / "README.md").read_text().lower()
    assert "simulated" in readme
    assert "research use only" in readme
