-- Jobs that are not done, oldest first. Column order is that of browse.JobRow.
SELECT
    id,
    CASE WHEN run_at > statement_timestamp() THEN CASE WHEN attempts > 0 THEN 'retrying' ELSE 'scheduled' END
        ELSE 'waiting' END AS state,
    queue, task, priority, generation, attempts, max_attempts, crashes, timeout_s, created_at, run_at, error_type,
    left(last_error, 200)
FROM {schema}.outbox
WHERE (CAST(:task AS text) IS NULL OR task = CAST(:task AS text))
    AND (CAST(:queue AS text) IS NULL OR queue = CAST(:queue AS text))
    AND (NOT CAST(:is_due AS boolean) OR run_at IS NULL OR run_at <= statement_timestamp())
ORDER BY id
LIMIT CAST(:limit AS int)
