"""Create the tables of jobq.

`DROPS` names what the downgrade takes away, so that the command line can say it before it happens. The schema
is that of the version table, and exists before the first revision runs.
"""

from __future__ import annotations

from alembic import op

revision = "jobq_0001"
down_revision = None
branch_labels = None
depends_on = None

DROPS = ("outbox", "idempotency_key", "step", "dead", "meta")


def upgrade() -> None:
    schema = f'"{op.get_context().version_table_schema}"'
    # A row lives from the commit that made it until its job is done. Whatever another language does not give
    # when it inserts has a default here, and what no release could run is refused at the INSERT. A repetition with a
    # bound, {1,64}, would make matching the queue's name cost as much as the rest of the INSERT.
    op.execute(f"""
        CREATE TABLE {schema}.outbox (
            id           uuid PRIMARY KEY
                CONSTRAINT outbox_id_is_not_nil CHECK (id <> '00000000-0000-0000-0000-000000000000'),
            generation   integer NOT NULL DEFAULT 1,
            queue        text NOT NULL
                CONSTRAINT outbox_queue_is_a_name CHECK (queue ~ '^[a-z0-9_.-]+$' AND length(queue) <= 64),
            task         text NOT NULL
                CONSTRAINT outbox_task_is_a_name CHECK (length(task) BETWEEN 1 AND 128),
            args         json NOT NULL
                CONSTRAINT outbox_args_are_at_most_1_mib CHECK (octet_length(CAST(args AS text)) <= 1048576)
                CONSTRAINT outbox_args_are_an_object CHECK (json_typeof(args) = 'object'),
            priority     smallint NOT NULL DEFAULT 2
                CONSTRAINT outbox_priority_is_1_to_4 CHECK (priority BETWEEN 1 AND 4),
            run_at       timestamptz
                CONSTRAINT outbox_run_at_is_in_the_years_1_to_9999
                CHECK (run_at > '0001-01-02 00:00:00+00' AND run_at < '9999-12-31 00:00:00+00'),
            attempts     smallint NOT NULL DEFAULT 0,
            crashes      smallint NOT NULL DEFAULT 0,
            max_attempts smallint,
            timeout_s    double precision
                CONSTRAINT outbox_timeout_is_positive CHECK (timeout_s > 0 AND timeout_s < 'Infinity'),
            created_at   timestamptz NOT NULL DEFAULT now(),
            headers      json
                CONSTRAINT outbox_headers_are_at_most_2_mib CHECK (octet_length(CAST(headers AS text)) <= 2097152)
                CONSTRAINT outbox_headers_are_an_object CHECK (json_typeof(headers) = 'object'),
            error_type   text,
            last_error   text,
            xid          xid8 NOT NULL DEFAULT pg_current_xact_id()
        )
    """)
    # Each job leaves a dead row, so vacuum follows the number of jobs and not the size of the table, and
    # works without pauses: the relay's polls stay cheap under any load.
    op.execute(f"""
        ALTER TABLE {schema}.outbox SET (
            autovacuum_vacuum_scale_factor = 0,
            autovacuum_vacuum_threshold = 5000,
            autovacuum_vacuum_insert_threshold = 50000,
            autovacuum_vacuum_cost_delay = 0
        )
    """)
    op.execute(f"CREATE INDEX outbox_xid ON {schema}.outbox (xid)")
    op.execute(f"CREATE INDEX outbox_run_at ON {schema}.outbox (run_at) WHERE run_at IS NOT NULL")

    op.execute(f"""
        CREATE TABLE {schema}.idempotency_key (
            scope      text NOT NULL,
            key        text NOT NULL,
            job_id     uuid NOT NULL,
            expires_at timestamptz NOT NULL,
            PRIMARY KEY (scope, key)
        )
    """)
    op.execute(f"CREATE INDEX idempotency_key_expires_at ON {schema}.idempotency_key (expires_at)")

    # No foreign key to outbox: a step's insert would wait for the DELETE of its own job.
    op.execute(f"""
        CREATE TABLE {schema}.step (
            job_id     uuid NOT NULL,
            name       text NOT NULL,
            result     json NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (job_id, name)
        )
    """)

    op.execute(f"""
        CREATE TABLE {schema}.dead (
            id           uuid PRIMARY KEY,
            generation   integer NOT NULL,
            queue        text NOT NULL,
            task         text NOT NULL,
            args         json NOT NULL,
            priority     smallint NOT NULL,
            run_at       timestamptz,
            attempts     smallint NOT NULL,
            crashes      smallint NOT NULL,
            max_attempts smallint,
            timeout_s    double precision,
            created_at   timestamptz NOT NULL,
            headers      json,
            error_type   text,
            last_error   text,
            reason       text NOT NULL
                CONSTRAINT dead_reason_is_known
                CHECK (reason IN ('exhausted', 'rejected', 'poison', 'invalid')),
            died_at      timestamptz NOT NULL DEFAULT now()
        )
    """)
    op.execute(f"CREATE INDEX dead_died_at ON {schema}.dead (died_at)")

    # The key admits one value, hence one row: two identities would split the jobs between two sets of keys.
    op.execute(f"""
        CREATE TABLE {schema}.meta (
            only_row    boolean PRIMARY KEY DEFAULT true CONSTRAINT meta_has_one_row CHECK (only_row),
            database_id uuid NOT NULL DEFAULT gen_random_uuid()
        )
    """)
    op.execute(f"INSERT INTO {schema}.meta DEFAULT VALUES")


def downgrade() -> None:
    schema = f'"{op.get_context().version_table_schema}"'
    for table in DROPS:
        op.execute(f"DROP TABLE {schema}.{table}")
