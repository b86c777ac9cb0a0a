-- End the sessions that a dead worker left in ctx.complete(); wait up to :wait_ms for each until it is gone.
SELECT count(pg_terminate_backend(pid, CAST(:wait_ms AS bigint)))
FROM pg_stat_activity
WHERE application_name = CAST(:name AS text) AND datname = current_database() AND pid <> pg_backend_pid()
