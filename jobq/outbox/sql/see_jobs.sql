-- Jobs that are not done, as this transaction sees them, in the order in which they were enqueued; of some tasks, or
-- of all where :tasks is null. Column order is that of rehearsal.SeenRow.
SELECT
    id, generation, task, queue, CAST(args AS text), priority, run_at, attempts, max_attempts, timeout_s, created_at,
    CAST(headers AS text), (run_at IS NULL OR run_at <= statement_timestamp()) AS due
FROM {schema}.outbox
WHERE CAST(:tasks AS text[]) IS NULL OR task = ANY (CAST(:tasks AS text[]))
ORDER BY id
