-- Let :seconds pass for everything that waits for its time: what is due at some moment is due so much sooner.
-- The new xid shows the rows to the relay's next poll.
WITH keys AS (
    UPDATE {schema}.idempotency_key
    SET expires_at = expires_at - make_interval(secs => CAST(:seconds AS float8))
)
UPDATE {schema}.outbox
SET run_at = run_at - make_interval(secs => CAST(:seconds AS float8)), xid = pg_current_xact_id()
WHERE run_at IS NOT NULL
