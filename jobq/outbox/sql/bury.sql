-- Move jobs to the dead, if they are still at the generation that ended. Looked up and locked as in
-- complete.sql.
WITH ended AS (
    SELECT found.ctid, asked.reason, asked.failed, asked.error_type, asked.error
    FROM (
        SELECT *
        FROM unnest(
            CAST(:ids AS uuid[]), CAST(:generations AS int[]), CAST(:reasons AS text[]), CAST(:failed AS boolean[]),
            CAST(:error_types AS text[]), CAST(:errors AS text[])
        ) AS asked (id, generation, reason, failed, error_type, error)
        ORDER BY id
    ) AS asked
    CROSS JOIN LATERAL (
        SELECT outbox.ctid
        FROM {schema}.outbox
        WHERE outbox.id = asked.id AND outbox.generation = asked.generation
        FOR UPDATE SKIP LOCKED
    ) AS found
),
gone AS (
    DELETE FROM {schema}.outbox
    USING ended
    WHERE outbox.ctid = ended.ctid
    RETURNING
        outbox.id, outbox.generation, outbox.queue, outbox.task, outbox.args, outbox.priority, outbox.run_at,
        outbox.attempts + CASE WHEN ended.failed THEN 1 ELSE 0 END AS attempts, outbox.crashes,
        outbox.max_attempts, outbox.timeout_s, outbox.created_at, outbox.headers,
        coalesce(ended.error_type, outbox.error_type) AS error_type,
        coalesce(ended.error, outbox.last_error) AS last_error, ended.reason
)
INSERT INTO {schema}.dead (
    id, generation, queue, task, args, priority, run_at, attempts, crashes, max_attempts, timeout_s, created_at,
    headers, error_type, last_error, reason
)
SELECT
    id, generation, queue, task, args, priority, run_at, attempts, crashes, max_attempts, timeout_s, created_at,
    headers, error_type, last_error, reason
FROM gone
ON CONFLICT (id) DO UPDATE SET
    generation = excluded.generation, attempts = excluded.attempts, crashes = excluded.crashes,
    error_type = excluded.error_type, last_error = excluded.last_error, reason = excluded.reason, died_at = now()
RETURNING id, task, queue, CAST(args AS text), attempts, crashes, reason, error_type, last_error
