-- Who holds or waits for a lock that keeps others from writing to the outbox, for longer than :longer_than_s seconds
-- of transaction: session, lock, and age in seconds. Ages that this role may not see are left out.
SELECT
    concat_ws(' ', pg_locks.pid, nullif(application_name, ''), state) AS session,
    CASE WHEN granted THEN 'holds ' ELSE 'waits for ' END || mode AS lock,
    CAST(extract(epoch FROM clock_timestamp() - xact_start) AS float8) AS age_s
FROM pg_locks
JOIN pg_stat_activity ON pg_stat_activity.pid = pg_locks.pid
WHERE locktype = 'relation' AND relation = to_regclass('{schema}.outbox')
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    AND xact_start < clock_timestamp() - make_interval(secs => CAST(:longer_than_s AS float8))
ORDER BY age_s DESC
LIMIT 5
