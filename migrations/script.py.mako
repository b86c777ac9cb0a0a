"""${message}."""

from __future__ import annotations

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}

DROPS: tuple[str, ...] = ()  # tables whose rows are lost by the downgrade


def upgrade() -> None:
    schema = f'"{op.get_context().version_table_schema}"'


def downgrade() -> None:
    schema = f'"{op.get_context().version_table_schema}"'
