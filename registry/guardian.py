"""The guard before MLflow's server: nobody but the mirror moves what the ledger decides.

`mlflow server --app-name formulary` starts MLflow's own app with it. A plain client meets 403 where it sets
or deletes an alias that names a slot or the tag that names a version's package, deletes a version, or deletes
or renames a registered model; all else is MLflow's. The mirror shows the promoter's secret, a file under
var/keys. Who can read that file, or write MLflow's database, passes; `registry.mirror` finds what was done
there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from imaging.config import read_places
from imaging.errors import TrustError
from imaging.vocabulary import Slot

DIGEST = "package_digest"  # the tag of a version that names its package
HEADER = "X-Formulary-Promoter"
REFUSAL = (
    "{what} is decided in the ledger, not here. Use `formulary registry ...`: promote, approve, challenge, "
    "rollback or retire; MLflow shows it two seconds later."
)


def is_protected(alias: str) -> bool:
    """Whether an alias names a slot: champion*, challenger*, previous*, in large or small letters."""
    return alias.lower().startswith(tuple(Slot))


def read_secret(var: Path) -> str:
    """The promoter's secret, var/keys/mlflow-promoter, mode 0600; it is made when there is none.

    Raises:
        TrustError: the file is damaged.
    """
    path = var / "keys" / "mlflow-promoter"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
        try:
            os.link(draft, path)  # whole or not at all; the first of two processes wins
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    secret = path.read_text().strip()
    if len(secret) < 64:
        raise TrustError(f"{path} is damaged.", "Remove it, then restart MLflow's server and the mirror.")
    return secret


class Promoter:
    """MLflow's request-header provider (entry point): sends the secret inside `promoting` alone."""

    secret: ClassVar[str] = ""

    def in_context(self) -> bool:
        """Whether this process is promoting now."""
        return bool(self.secret)

    def request_headers(self) -> dict[str, str]:
        """The header that the guard looks for."""
        return {HEADER: self.secret}


@contextmanager
def promoting(var: Path) -> Iterator[None]:
    """Send the promoter's secret with every request that MLflow's client makes in here."""
    Promoter.secret = read_secret(var)
    try:
        yield
    finally:
        Promoter.secret = ""


def create_app() -> Any:
    """MLflow's app with the guard before its routes; var is where FORMULARY_ROOT or FORMULARY_VAR says.

    Returns:
        An ASGI application for one uvicorn process.
    """
    from flask import request
    from mlflow.exceptions import MlflowException
    from mlflow.protos import model_registry_pb2 as asked
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
    from mlflow.server import app, handlers
    from mlflow.server.fastapi_app import app as served

    secret = read_secret(read_places().var).encode()
    guarded = {
        asked.SetRegisteredModelAlias: "Where an alias of a slot points",
        asked.DeleteRegisteredModelAlias: "Where an alias of a slot points",
        asked.SetModelVersionTag: "Which package a version is",
        asked.DeleteModelVersionTag: "Which package a version is",
        asked.DeleteModelVersion: "Whether a version ends",
        asked.DeleteRegisteredModel: "Whether a model ends",
        asked.RenameRegisteredModel: "What a model is called",
    }
    routes = {
        (path, method): kind for path, kind, methods in handlers.get_endpoints(lambda kind: kind)
        for method in methods if kind in guarded
    }  # fmt: skip

    @app.before_request
    @handlers.catch_mlflow_exception  # type: ignore[untyped-decorator,unused-ignore]
    def refuse() -> None:
        kind = routes.get((str(request.url_rule), request.method))
        shown = request.headers.get(HEADER, "").encode()
        if kind is None or secrets.compare_digest(shown, secret):
            return
        message = handlers._get_request_message(kind())
        other = getattr(message, "key", DIGEST) != DIGEST  # a tag that anybody may write
        if not other and is_protected(getattr(message, "alias", str(Slot.CHAMPION))):
            raise MlflowException(REFUSAL.format(what=guarded[kind]), PERMISSION_DENIED)

    return served
