"""The journal of predictions, and the verdicts that the monitor writes of them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "predictions",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("package", sa.Text, nullable=False),
        sa.Column("engine", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=True),
        sa.Column("image", sa.Text, nullable=False),
        sa.Column("columns", sa.Text, nullable=False),
        sa.Column("stages_ms", sa.Text, nullable=False),
    )
    op.create_index("predictions_by_place", "predictions", ["task", "site", "version", "seq"])
    op.create_table(
        "verdicts",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("last_seq", sa.Integer, nullable=False),
        sa.Column("subjects", sa.Integer, nullable=False),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("level", sa.Float, nullable=False),
        sa.Column("columns", sa.Text, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
    )
    op.create_index("verdicts_by_place", "verdicts", ["task", "site", "seq"])
    for table in ("predictions", "verdicts"):
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
            )


def downgrade() -> None:
    for table in ("verdicts", "predictions"):
        op.drop_table(table)
