-- Where jobs are now: waiting or later, or dead. A job that is not answered is done, or was never committed.
SELECT id, CASE WHEN run_at > statement_timestamp() THEN 'later' ELSE 'waiting' END
FROM {schema}.outbox
WHERE id = ANY (CAST(:ids AS uuid[]))
UNION ALL
SELECT id, 'dead'
FROM {schema}.dead
WHERE id = ANY (CAST(:ids AS uuid[]))
