-- Delete idempotency keys that have expired and whose job is neither in the outbox nor dead.
-- The job is looked up for each row, whatever the planner believes of the outbox (complete.sql says more).
-- MATERIALIZED: a subquery could be run once for each row that it is joined to, and its LIMIT with it.
WITH gone AS MATERIALIZED (
    SELECT scope, key
    FROM {schema}.idempotency_key AS held
    WHERE expires_at <= now()
        AND (SELECT id FROM {schema}.outbox WHERE id = held.job_id) IS NULL
        AND (SELECT id FROM {schema}.dead WHERE id = held.job_id) IS NULL
    LIMIT CAST(:limit AS int)
    FOR UPDATE SKIP LOCKED
)
DELETE FROM {schema}.idempotency_key
USING gone
WHERE idempotency_key.scope = gone.scope AND idempotency_key.key = gone.key
RETURNING 1
