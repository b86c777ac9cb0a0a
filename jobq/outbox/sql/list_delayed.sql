-- Jobs that are not due yet, soonest first: after a failed attempt, or scheduled. Column order as in list_jobs.sql.
SELECT
    id,
    CASE WHEN attempts > 0 THEN 'retrying' ELSE 'scheduled' END AS state,
    queue, task, priority, generation, attempts, max_attempts, crashes, timeout_s, created_at, run_at, error_type,
    left(last_error, 200)
FROM {schema}.outbox
WHERE run_at > statement_timestamp() AND (attempts > 0) = CAST(:has_failed AS boolean)
    AND (CAST(:task AS text) IS NULL OR task = CAST(:task AS text))
    AND (CAST(:queue AS text) IS NULL OR queue = CAST(:queue AS text))
ORDER BY run_at, id
LIMIT CAST(:limit AS int)
