"""What a replay needs: digest of the answer, and which place of which batch the image had."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for name in ("answer", "batch"):
        op.add_column("predictions", sa.Column(name, sa.Text, nullable=False, server_default=""))


def downgrade() -> None:
    for name in ("batch", "answer"):
        op.drop_column("predictions", name)
