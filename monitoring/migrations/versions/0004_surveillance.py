"""What surveillance needs: acquisition, refusals, assessments, alarms, estimates, and its own state."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
PLACE = ("task", "site", "version")
KEPT = {
    "refusals": {"task": sa.Text, "site": sa.Text, "reason": sa.Text, "count": sa.Integer},
    "assessments": {
        "prediction": sa.Text, "task": sa.Text, "site": sa.Text, "version": sa.Integer, "source": sa.Text,
        "verdict": sa.Text, "reason": sa.Text, "reader": sa.Text,
    },
    "alarms": {
        "task": sa.Text, "site": sa.Text, "version": sa.Integer, "kind": sa.Text, "statistic": sa.Text,
        "part": sa.Text, "direction": sa.Text, "value": sa.Float, "bound": sa.Float, "since": sa.Text,
        "budget_days": sa.Float, "last_seq": sa.Integer, "detail": sa.Text,
    },
    "estimates": {
        "task": sa.Text, "site": sa.Text, "version": sa.Integer, "last_seq": sa.Integer, "body": sa.Text,
    },
}  # fmt: skip


def upgrade() -> None:
    op.add_column("predictions", sa.Column("acquisition", sa.Text, nullable=False, server_default="{}"))
    for table, names in KEPT.items():
        op.create_table(
            table,
            sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
            sa.Column("at", sa.Text, nullable=False),
            *(sa.Column(name, kind, nullable=False) for name, kind in names.items()),
            *([sa.Column("truth", sa.Integer, nullable=True)] if table == "assessments" else []),
            sqlite_autoincrement=True,
        )
        op.create_index(f"{table}_by_place", table, ["task", "site", "seq"])
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
            )
    op.create_index("assessments_by_prediction", "assessments", ["prediction", "seq"])
    op.create_table(  # derived: it can be made again from the rows above
        "streams",
        *(sa.Column(name, sa.Integer if name == "version" else sa.Text, primary_key=True) for name in PLACE),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("last_seq", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("history", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "cursors",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("seq", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    for table in ("cursors", "streams", *KEPT):
        op.drop_table(table)
    op.drop_column("predictions", "acquisition")
