-- One job that is not done, with its arguments. Column order is that of browse.JobRow.
SELECT
    id,
    CASE WHEN run_at > statement_timestamp() THEN CASE WHEN attempts > 0 THEN 'retrying' ELSE 'scheduled' END
        ELSE 'waiting' END AS state,
    queue, task, priority, generation, attempts, max_attempts, crashes, timeout_s, created_at, run_at, error_type,
    last_error, CAST(headers AS text), CAST(args AS text)
FROM {schema}.outbox
WHERE id = CAST(:id AS uuid)
