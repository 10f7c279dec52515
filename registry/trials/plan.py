"""What a silent trial promises before its first case, and which studies a canary answers."""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field, WithJsonSchema

from imaging.recipe import Section
from imaging.vocabulary import Endpoint

LOOK = 10
FLAT = WithJsonSchema({"type": "string", "enum": list(Endpoint)})  # OpenAPI follows no reference into a body
SITE_SUBJECTS = 30  # that decided at a site, or a trial that passed has not passed there
MOST_WEIGHT = 0.5  # of a canary; who wants more studies answered approves the version


class Plan(Section):
    """Written into the ledger when the trial starts, and not changed afterwards.

    Attributes:
        size: subjects after whom it ends undecided; the stop rule mostly ends it before.
        margin: agreement: the share of subjects, 0 to 1, who may get another finding than the champion's.
            accuracy: by how much the share of right answers may be below the champion's.
        alpha: bound on the probability of a wrong verdict, however often one looks.
        endpoint: what decides.
        look: cases between two looks.
    """

    size: int = Field(ge=10, le=100_000, description="Subjects after whom it ends without a verdict.")
    margin: float = Field(gt=0, le=0.5, description="Agreement: the share of subjects who may get another "
                          "finding. Accuracy: by how much it may be below the champion's.")  # fmt: skip
    alpha: float = Field(0.05, ge=0.001, le=0.2, description="How often a verdict may be wrong.")
    endpoint: Annotated[Endpoint, FLAT] = Field(
        Endpoint.AGREEMENT,
        description="What decides: agreement (no truth is needed) or accuracy (of late labels).",
    )
    look: int = Field(LOOK, ge=1, description="Cases between two looks.")


def takes_canary(study: str, task: str, version_digest: str, weight: float) -> bool:
    """Whether a study is answered by the canary: always the same answer, and a larger weight takes none back.

    Args:
        study: what names the study at its site; never logged, a hash of it decides.
        task: the task.
        version_digest: of the canary's package, so that each canary draws other studies.
        weight: the share of studies, 0 to 1.
    """
    told = hashlib.sha256(f"{task}\0{version_digest}\0{study}".encode()).digest()
    return int.from_bytes(told[:8], "big") < weight * 2**64
