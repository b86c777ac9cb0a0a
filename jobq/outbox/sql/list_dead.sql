-- Dead jobs, the latest first; a filter that is null takes all. Column order is that of browse.DeadRow.
SELECT
    id, reason, queue, task, priority, generation, attempts, max_attempts, crashes, timeout_s, created_at, run_at,
    died_at, error_type, left(last_error, 200)
FROM {schema}.dead
WHERE (CAST(:ids AS uuid[]) IS NULL OR id = ANY (CAST(:ids AS uuid[])))
    AND (CAST(:task AS text) IS NULL OR task = CAST(:task AS text))
    AND (CAST(:queue AS text) IS NULL OR queue = CAST(:queue AS text))
    AND (CAST(:reason AS text) IS NULL OR reason = CAST(:reason AS text))
    AND (
        CAST(:error AS text) IS NULL
        OR strpos(lower(concat_ws(' ', error_type, last_error)), lower(CAST(:error AS text))) > 0
    )
ORDER BY died_at DESC, id
LIMIT CAST(:limit AS int)
