-- Count the jobs of each queue and task, in :percent of the table's pages (100: all of them, exactly).
-- Jobs in :held are in a worker's hands. The age is that of the job that has been due for longest, in seconds.
SELECT
    queue,
    task,
    count(*) FILTER (WHERE is_due AND NOT is_held) AS waiting,
    count(*) FILTER (WHERE NOT is_due AND attempts = 0) AS scheduled,
    count(*) FILTER (WHERE NOT is_due AND attempts > 0) AS retrying,
    CAST(
        extract(epoch FROM clock_timestamp() - min(due_at) FILTER (WHERE is_due AND NOT is_held)) AS float8
    ) AS oldest_waiting_s
FROM (
    SELECT
        queue, task, attempts,
        coalesce(run_at, created_at) AS due_at,
        (run_at IS NULL OR run_at <= statement_timestamp()) AS is_due,
        (id = ANY (CAST(:held AS uuid[]))) IS TRUE AS is_held
    FROM {schema}.outbox TABLESAMPLE SYSTEM (CAST(:percent AS float8))
) AS job
GROUP BY queue, task
ORDER BY queue, task
