"""What a day at a site is counted by: its answers, whatever the order in which they came."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_index("predictions_by_day", "predictions", ["task", "site", "at", "version"])


def downgrade() -> None:
    op.drop_index("predictions_by_day")
