-- What keeps vacuum from removing dead rows for longer than :longer_than_s seconds, the oldest first: open
-- transactions, and replication slots that hold a snapshot for a standby that is away. Of sessions whose age this
-- role may not see, only that they are there (held_s is null).
SELECT kind, name, held_s
FROM (
    SELECT
        CASE WHEN xact_start IS NULL THEN 'hidden' ELSE 'session' END AS kind,
        concat_ws(' ', pid, nullif(application_name, ''), state) AS name,
        CAST(extract(epoch FROM clock_timestamp() - xact_start) AS float8) AS held_s
    FROM pg_stat_activity
    WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
        AND (datname = current_database() OR datname IS NULL)
        AND backend_type IS DISTINCT FROM 'autovacuum worker' AND pid <> pg_backend_pid()
    UNION ALL
    SELECT 'slot', slot_name, NULL
    FROM pg_replication_slots
    WHERE xmin IS NOT NULL AND NOT active
) AS holder
WHERE held_s IS NULL OR held_s > CAST(:longer_than_s AS float8)
ORDER BY held_s DESC NULLS LAST
LIMIT 5
