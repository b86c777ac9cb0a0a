-- Read jobs before they run, on the primary. Column order is that of model.Job.
SELECT
    id, generation, queue, task, CAST(args AS text), priority, attempts, crashes,
    max_attempts, timeout_s, CAST(headers AS text)
FROM {schema}.outbox
WHERE id = ANY (CAST(:ids AS uuid[]))
