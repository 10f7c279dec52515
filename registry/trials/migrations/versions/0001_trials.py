"""What challengers said in silent trials, the truth that came later, and what was never shown to them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "cases",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("trial", sa.Integer, nullable=False),
        sa.Column("prediction", sa.Text, nullable=False),
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=True),
        sa.Column("champion", sa.Integer, nullable=False),
        sa.Column("difference", sa.Float, nullable=False),
        sa.Column("champion_positive", sa.Integer, nullable=True),
        sa.Column("positive", sa.Integer, nullable=True),
        sa.Column("champion_ms", sa.Float, nullable=False),
        sa.Column("wall_ms", sa.Float, nullable=False),
        sa.Column("cpu_ms", sa.Float, nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        sa.UniqueConstraint("trial", "prediction"),
    )
    op.create_table(
        "truths",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("prediction", sa.Text, nullable=False, unique=True),
        sa.Column("positive", sa.Integer, nullable=False),
    )
    op.create_table(
        "drops",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("trial", sa.Integer, nullable=False),
        sa.Column("cases", sa.Integer, nullable=False),
    )
    for table in ("cases", "truths", "drops"):
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'the rows of a trial are append-only'); END"
            )


def downgrade() -> None:
    for table in ("drops", "truths", "cases"):
        op.drop_table(table)
