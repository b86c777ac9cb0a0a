"""Have a commit wake the relay, if it sleeps.

A trigger on outbox; no table changes.
"""

from __future__ import annotations

from alembic import op

revision = "jobq_0002"
down_revision = "jobq_0001"
branch_labels = None
depends_on = None

DROPS = ()


def upgrade() -> None:
    schema = f'"{op.get_context().version_table_schema}"'
    # NOTIFY makes commits wait for one another, so a writer does without wherever it can. The relay sleeps only
    # while it holds the lock: a writer that gets its share of it knows that the relay is awake, and cannot fall
    # asleep before this commit is visible. 1785684599 is WAKE_LOCK of jobq.outbox.follow.
    op.execute(f"""
        CREATE FUNCTION {schema}.wake_relay() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF pg_catalog.current_setting('jobq.notify', true) IS DISTINCT FROM 'off'
                AND NOT pg_catalog.pg_try_advisory_xact_lock_shared(
                    1785684599, pg_catalog.hashtext(CAST(TG_TABLE_SCHEMA AS pg_catalog.text))
                )
            THEN
                PERFORM pg_catalog.pg_notify('jobq', CAST(TG_TABLE_SCHEMA AS pg_catalog.text));
            END IF;
            RETURN NULL;
        END
        $$
    """)
    op.execute(f"""
        CREATE TRIGGER wake_relay AFTER INSERT OR UPDATE OF xid, run_at ON {schema}.outbox
        FOR EACH STATEMENT EXECUTE FUNCTION {schema}.wake_relay()
    """)


def downgrade() -> None:
    schema = f'"{op.get_context().version_table_schema}"'
    op.execute(f"DROP TRIGGER wake_relay ON {schema}.outbox")
    op.execute(f"DROP FUNCTION {schema}.wake_relay()")
