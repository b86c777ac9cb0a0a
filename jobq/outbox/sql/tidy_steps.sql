-- Delete recovery points whose job is neither in the outbox nor dead. An hour's grace: a step is written before
-- its own job can be seen to be gone by every transaction.
-- The job is looked up for each row, whatever the planner believes of the outbox (complete.sql says more).
-- MATERIALIZED: a subquery could be run once for each row that it is joined to, and its LIMIT with it.
WITH gone AS MATERIALIZED (
    SELECT job_id, name
    FROM {schema}.step AS point
    WHERE created_at < now() - interval '1 hour'
        AND (SELECT id FROM {schema}.outbox WHERE id = point.job_id) IS NULL
        AND (SELECT id FROM {schema}.dead WHERE id = point.job_id) IS NULL
    LIMIT CAST(:limit AS int)
    FOR UPDATE SKIP LOCKED
)
DELETE FROM {schema}.step
USING gone
WHERE step.job_id = gone.job_id AND step.name = gone.name
RETURNING 1
