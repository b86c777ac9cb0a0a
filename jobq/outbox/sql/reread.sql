-- Read rows of a page again, after Redis said that it does not know them. Because acks follow commits, a row that
-- is still here at this moment is in no list of Redis.
SELECT id, generation, queue, priority
FROM {schema}.outbox
WHERE id = ANY (CAST(:ids AS uuid[])) AND (run_at IS NULL OR run_at <= clock_timestamp())
ORDER BY id
