-- The job of these tasks that comes next, and the seconds until it is due: of those that are due the most urgent,
-- as a worker takes them, else the one that is due soonest.
SELECT
    id, CAST(greatest(coalesce(extract(epoch FROM run_at - statement_timestamp()), 0), 0) AS float8) AS due_in_s
FROM {schema}.outbox
WHERE task = ANY (CAST(:tasks AS text[]))
ORDER BY due_in_s, priority, id
LIMIT 1
