-- Who has kept the relay from sleeping for longer than :longer_than_s seconds: transactions that have shared the lock
-- of :space and this schema since they enqueued. A prepared one has no session any more.
SELECT
    pg_locks.pid,
    concat_ws(' ', nullif(application_name, ''), state) AS session,
    CAST(extract(epoch FROM clock_timestamp() - xact_start) AS float8) AS age_s
FROM pg_locks
LEFT JOIN pg_stat_activity ON pg_stat_activity.pid = pg_locks.pid
WHERE locktype = 'advisory' AND granted AND mode = 'ShareLock'
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND classid = CAST(CAST(:space AS int) AS oid)
    AND objid = CAST(CAST(hashtext(CAST(:schema_name AS text)) AS bigint) & 4294967295 AS oid)
    AND objsubid = 2
    AND (
        pg_locks.pid IS NULL
        OR xact_start < clock_timestamp() - make_interval(secs => CAST(:longer_than_s AS float8))
    )
ORDER BY age_s DESC NULLS FIRST
LIMIT 5
