-- Complete one job inside the transaction of its effects. Waits for the row's lock (lock_timeout bounds it), so
-- that a second run of the same job stands still here until the first has committed or rolled back.
DELETE FROM {schema}.outbox
WHERE id = CAST(:id AS uuid) AND generation = CAST(:generation AS int)
RETURNING CAST(pg_current_xact_id() AS text)
