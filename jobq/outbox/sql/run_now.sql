-- Make jobs due that are not: a new generation fences the timers that relays hold for them, and the new xid shows
-- the rows to the next poll.
WITH later AS (
    SELECT id
    FROM {schema}.outbox
    WHERE id = ANY (CAST(:ids AS uuid[])) AND run_at > statement_timestamp()
    ORDER BY id
    FOR UPDATE
)
UPDATE {schema}.outbox
SET generation = outbox.generation + 1, run_at = NULL, xid = pg_current_xact_id()
FROM later
WHERE outbox.id = later.id
RETURNING outbox.id
