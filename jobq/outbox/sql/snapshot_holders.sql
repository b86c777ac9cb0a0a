-- What keeps vacuum from removing dead rows for longer than :longer_than_s seconds, the oldest first: open
-- transactions, prepared ones, and replication slots that hold a snapshot for a standby that is away.
SELECT kind, name, held_s
FROM (
    SELECT
        'session' AS kind,
        concat_ws(' ', pid, nullif(application_name, ''), state) AS name,
        CAST(extract(epoch FROM clock_timestamp() - xact_start) AS float8) AS held_s
    FROM pg_stat_activity
    WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
        AND (datname = current_database() OR datname IS NULL)
        AND backend_type <> 'autovacuum worker' AND pid <> pg_backend_pid()
    UNION ALL
    SELECT 'prepared', gid, CAST(extract(epoch FROM clock_timestamp() - prepared) AS float8)
    FROM pg_prepared_xacts
    WHERE database = current_database()
    UNION ALL
    SELECT 'slot', slot_name, NULL
    FROM pg_replication_slots
    WHERE xmin IS NOT NULL AND NOT active
) AS holder
WHERE held_s IS NULL OR held_s > CAST(:longer_than_s AS float8)
ORDER BY held_s DESC NULLS LAST
LIMIT 5
