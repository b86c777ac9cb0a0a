-- The generations, crash counts and due state that rows have now.
SELECT id, generation, crashes, (run_at IS NULL OR run_at <= clock_timestamp()) AS due
FROM {schema}.outbox
WHERE id = ANY (CAST(:ids AS uuid[]))
