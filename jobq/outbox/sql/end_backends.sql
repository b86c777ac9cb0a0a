-- End the sessions that a dead worker left in ctx.complete(): they would hold the locks of its jobs.
SELECT count(pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE application_name = CAST(:name AS text) AND datname = current_database() AND pid <> pg_backend_pid()
