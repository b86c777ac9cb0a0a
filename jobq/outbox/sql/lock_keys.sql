-- Take keys under all names that a statement with former names is going to claim, in one order: that statement takes
-- the former names first, and a release that knows them as the tasks' own may hold others of its keys by then.
-- What nobody has yet is held for no job, as long expired, and is taken over by the claim.
INSERT INTO {schema}.idempotency_key AS held (scope, key, job_id, expires_at)
SELECT scope, key, CAST('00000000-0000-0000-0000-000000000000' AS uuid), CAST('-infinity' AS timestamptz)
FROM unnest(CAST(:scopes AS text[]), CAST(:keys AS text[])) AS asked (scope, key)
GROUP BY scope, key
ORDER BY scope COLLATE "C", key COLLATE "C"
ON CONFLICT (scope, key) DO UPDATE SET job_id = held.job_id
