"""params.yaml and sites.yaml as typed, frozen values, and the places things lie (environment).

A misspelt key is refused by name. Functions take the section they need (imaging/recipe.py), never the whole.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from imaging.errors import ConfigError, UnknownSite, UnknownTask
from imaging.recipe import Profile, Section, TaskSection
from imaging.vocabulary import SiteKind


class Params(Section):
    """params.yaml."""

    profiles: dict[str, Profile]
    tasks: dict[str, TaskSection]

    @model_validator(mode="after")
    def _profiles_exist(self) -> Self:
        for name, task in self.tasks.items():
            if task.cohort.profile not in self.profiles:
                raise ValueError(
                    f"tasks.{name}.cohort.profile: no profile {task.cohort.profile!r} in profiles"
                )
        return self

    def task(self, name: str) -> TaskSection:
        """The section of a task.

        Raises:
            UnknownTask: params.yaml has no such section.
        """
        if name not in self.tasks:
            raise UnknownTask(f"No task {name[:60]!r} in params.yaml.", suggest(name, self.tasks, "Tasks"))
        return self.tasks[name]


class Site(Section):
    """A place where images are made.

    Attributes:
        per_second: predictions that it may ask for each second; as many as it likes unless told.
        keep_days: for how many days its pixels are kept, encrypted, for the console; 0 keeps none.
    """

    kind: SiteKind
    title: str
    per_second: float | None = Field(default=None, ge=1)
    keep_days: int = Field(default=0, ge=0, le=365)


class Sites(Section):
    """sites.yaml."""

    sites: dict[str, Site]

    def names(self, kind: SiteKind | None = None) -> list[str]:
        """Names of all sites, or of one kind, in the order of the file."""
        return [name for name, site in self.sites.items() if kind in (None, site.kind)]

    def site(self, name: str) -> Site:
        """A site by name.

        Raises:
            UnknownSite: sites.yaml does not list it.
        """
        if name not in self.sites:
            raise UnknownSite(f"No site {name[:60]!r} in sites.yaml.", suggest(name, self.sites, "Sites"))
        return self.sites[name]


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Attributes:
        root: the checkout, with params.yaml and sites.yaml.
        build: stage outputs.
        var: databases, keys, packages, reports.
    """

    root: Path
    build: Path
    var: Path

    @property
    def policies(self) -> Path:
        """Where the policies of the tasks lie, one YAML file each."""
        return self.root / "registry" / "policies"

    def stage(self, task: str, name: str) -> Path:
        """Where a stage of a task writes, e.g. build/brain-tissue/fit."""
        return self.build / task / name


def read_places() -> Places:
    """Places from FORMULARY_ROOT (default: the working folder), FORMULARY_BUILD and FORMULARY_VAR."""
    root = Path(os.environ.get("FORMULARY_ROOT", ".")).resolve()
    build = Path(os.environ.get("FORMULARY_BUILD", root / "build"))
    return Places(root=root, build=build, var=Path(os.environ.get("FORMULARY_VAR", root / "var")))


def suggest(name: str, known: dict[str, Any], noun: str) -> str:
    """A fix for a misspelt name: the nearest known one, and all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"{noun}: {', '.join(sorted(known))}."


Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, model: type[Model]) -> Model:
    """Read a YAML file as a typed value.

    Raises:
        ConfigError: the file is missing, is not YAML, or has a wrong or misspelt key, named.
    """
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist.", "Run from the root of a checkout, or set FORMULARY_ROOT."
        )
    try:
        return model.model_validate(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not YAML: {str(error)[:200]}.", "Mend the file.") from error
    except ValidationError as error:
        raise ConfigError(
            f"{path.name}: {explain(error, model)}.", "Mend the key; nothing was run."
        ) from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error in one line: where, and what; a misspelt key with the nearest known one."""
    parts = []
    for item in error.errors()[:5]:
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), _keys(model), n=1)
            parts.append(f"unknown key {where!r}" + (f", did you mean {near[0]!r}" if near else ""))
        else:
            parts.append(f"{where}: {item['msg']}")
    return "; ".join(parts)


def _keys(model: type[BaseModel]) -> set[str]:
    """Every key that the model and the sections below it know."""
    schema = model.model_json_schema()
    sections = [schema, *schema.get("$defs", {}).values()]
    return {key for section in sections for key in section.get("properties", {})}


def read_params(places: Places) -> Params:
    """params.yaml of the checkout."""
    return read_yaml(places.root / "params.yaml", Params)


def read_sites(places: Places) -> Sites:
    """sites.yaml of the checkout."""
    return read_yaml(places.root / "sites.yaml", Sites)
