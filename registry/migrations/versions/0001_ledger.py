"""The ledger, and the moves that MLflow has not seen."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

SQLITE = [
    f"CREATE TRIGGER events_no_{verb.lower()} BEFORE {verb} ON events "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    for verb in ("UPDATE", "DELETE")
]
POSTGRESQL = [
    "CREATE FUNCTION events_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
    "'the ledger is append-only' USING ERRCODE = 'integrity_constraint_violation'; END $$",
    "CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON events "
    "FOR EACH STATEMENT EXECUTE FUNCTION events_refuse()",
    "ALTER TABLE events ENABLE ALWAYS TRIGGER events_append_only",  # replicas too
]


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("previous", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False, unique=True),
        sa.Column("signature", sa.Text, nullable=False),
    )
    op.create_index("events_by_task", "events", ["task", "kind", "seq"])
    for statement in POSTGRESQL if op.get_bind().dialect.name == "postgresql" else SQLITE:
        op.execute(statement)
    op.create_table(
        "outbox",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("event", sa.Integer, sa.ForeignKey("events.seq"), nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("done", sa.Text, nullable=True),
    )


def downgrade() -> None:
    for table in ("outbox", "events"):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION events_refuse")
