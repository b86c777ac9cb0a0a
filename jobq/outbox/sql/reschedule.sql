-- Give jobs a new generation: after a failure, a snooze or an interrupted run. The old entry is fenced by it, and
-- the new xid shows the row to the relay's next poll. Looked up and locked as in complete.sql.
WITH ended AS (
    SELECT found.ctid, asked.delay_s, asked.failed, asked.error_type, asked.error
    FROM (
        SELECT *
        FROM unnest(
            CAST(:ids AS uuid[]), CAST(:generations AS int[]), CAST(:delays_s AS float8[]), CAST(:failed AS boolean[]),
            CAST(:error_types AS text[]), CAST(:errors AS text[])
        ) AS asked (id, generation, delay_s, failed, error_type, error)
        ORDER BY id
    ) AS asked
    CROSS JOIN LATERAL (
        SELECT outbox.ctid
        FROM {schema}.outbox
        WHERE outbox.id = asked.id AND outbox.generation = asked.generation
        FOR UPDATE SKIP LOCKED
    ) AS found
)
UPDATE {schema}.outbox
SET
    generation = outbox.generation + 1,
    attempts = outbox.attempts + CASE WHEN ended.failed THEN 1 ELSE 0 END,
    crashes = 0,
    run_at = CASE WHEN ended.delay_s > 0 THEN statement_timestamp() + make_interval(secs => ended.delay_s) END,
    error_type = coalesce(ended.error_type, outbox.error_type),
    last_error = coalesce(ended.error, outbox.last_error),
    xid = pg_current_xact_id()
FROM ended
WHERE outbox.ctid = ended.ctid
RETURNING outbox.id
