-- One dead job, with its arguments. Column order is that of browse.DeadRow.
SELECT
    id, reason, queue, task, priority, generation, attempts, max_attempts, crashes, timeout_s, created_at, run_at,
    died_at, error_type, last_error, CAST(headers AS text), CAST(args AS text)
FROM {schema}.dead
WHERE id = CAST(:id AS uuid)
