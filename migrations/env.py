"""Where alembic is told about the connection or the text that revisions go to.

Owns nothing: `jobq.migrate` holds the lock and the connection, and passes what is needed in the attributes of
the configuration. Invariant: the version table lies in the schema of the tables, and a revision and its mark
there are one transaction. Loaded by alembic.
"""

from __future__ import annotations

from typing import Any

from alembic import context

attributes = context.config.attributes
if "schema" not in attributes:
    raise RuntimeError("these revisions are run by `jobq migrate`, which holds the lock that they need")

schema: str = attributes["schema"]
options: dict[str, Any] = {"version_table_schema": schema, "transaction_per_migration": True}

if context.is_offline_mode():
    first, last = attributes["path"]
    context.configure(url="postgresql+asyncpg://", **options)
    with context.begin_transaction():
        if first == "base":
            context.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
        context.run_migrations()
        if last == "base":
            context.execute(f'DROP TABLE IF EXISTS "{schema}".alembic_version')
else:
    context.configure(connection=attributes["connection"], on_version_apply=attributes["on_apply"], **options)
    with context.begin_transaction():
        context.run_migrations()
