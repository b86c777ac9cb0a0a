-- End the session that holds the leader's lock, seen from a standby that watched it do nothing.
SELECT count(pg_terminate_backend(pid))
FROM pg_locks
WHERE locktype = 'advisory' AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND classid = CAST(CAST(:space AS int) AS oid)
    AND objid = CAST(CAST(hashtext(CAST(:schema_name AS text)) AS bigint) & 4294967295 AS oid)
    AND objsubid = 2 AND pid <> pg_backend_pid()
