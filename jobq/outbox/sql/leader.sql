-- The session that holds the leader's lock, and for how long it has been connected, in seconds.
SELECT
    pg_locks.pid,
    CAST(extract(epoch FROM clock_timestamp() - pg_stat_activity.backend_start) AS float8) AS connected_s
FROM pg_locks
LEFT JOIN pg_stat_activity ON pg_stat_activity.pid = pg_locks.pid
WHERE locktype = 'advisory' AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND classid = CAST(CAST(:space AS int) AS oid)
    AND objid = CAST(CAST(hashtext(CAST(:schema_name AS text)) AS bigint) & 4294967295 AS oid)
    AND objsubid = 2
