"""Policy as code: what evidence must show before a version serves, per task."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from imaging.config import Section, read_yaml
from imaging.errors import ConfigError
from imaging.manifest import digest_file
from imaging.vocabulary import Statement


class Bounds(Section):
    """What one population must show.

    Attributes:
        subjects: the least number a verdict may rest on.
        low: metric -> the lower end of its interval must reach this.
    """

    subjects: int = Field(ge=1)
    low: dict[str, float] = Field(min_length=1)


class Policy(Section):
    """The bounds of a task, and who may agree to a version.

    Attributes:
        network: over the test sets of all internal sites together.
        internal: at each internal site by itself.
        external: at each external site by itself.
        statements: what must be signed.
        approvers: identities that may approve; empty means anyone but the author and the asker.
    """

    task: str
    why: str
    network: Bounds
    internal: Bounds
    external: Bounds
    statements: tuple[Statement, ...]
    approvers: tuple[str, ...] = ()


POLICIES = Path(__file__).parent / "policies"


def policy_path(task: str, folder: Path = POLICIES) -> Path:
    """Where the policy of a task lies."""
    return folder / f"{task}.yaml"


def read_policy(task: str, folder: Path = POLICIES) -> Policy:
    """Read the policy of a task.

    Raises:
        ConfigError: there is none, a key is misspelt, or it is another task's.
    """
    policy = read_yaml(policy_path(task, folder), Policy)
    if policy.task != task:
        raise ConfigError(f"{task}.yaml is the policy of {policy.task}.", "Mend its `task`.")
    return policy


def digest_policy(task: str, folder: Path = POLICIES) -> str:
    """sha256 of the policy's file, for the ledger."""
    return "sha256:" + digest_file(policy_path(task, folder))


def explain_policy(policy: Policy) -> list[str]:
    """The policy in plain sentences."""
    sentences = [policy.why]
    places = (("Over all internal sites", policy.network), ("At an internal site", policy.internal),
              ("At an external site", policy.external))  # fmt: skip
    for where, bounds in places:
        asked = ", ".join(f"{metric.replace('_', ' ')} {low:g}" for metric, low in bounds.low.items())
        sentences.append(
            f"{where}, on at least {bounds.subjects} subjects, the interval's lower end must reach {asked}."
        )
    sentences.append(f"Signed statements: {', '.join(policy.statements)}.")
    who = ", ".join(policy.approvers) if policy.approvers else "anyone"
    sentences.append(f"A second person approves: {who}, not the author and not who asked.")
    return sentences
