-- Replication slots that nobody reads, and the bytes of WAL that each keeps, the most first.
SELECT slot_name, CAST(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) AS int8) AS kept
FROM pg_replication_slots
WHERE NOT active AND restart_lsn IS NOT NULL
ORDER BY kept DESC
LIMIT 5
