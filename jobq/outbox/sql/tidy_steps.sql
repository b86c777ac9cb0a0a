-- Delete recovery points whose job is neither in the outbox nor dead. An hour's grace: a step is written before
-- its own job can be seen to be gone by every transaction.
DELETE FROM {schema}.step
WHERE (job_id, name) IN (
    SELECT job_id, name
    FROM {schema}.step AS point
    WHERE created_at < now() - interval '1 hour'
        AND NOT EXISTS (SELECT FROM {schema}.outbox WHERE id = point.job_id)
        AND NOT EXISTS (SELECT FROM {schema}.dead WHERE id = point.job_id)
    LIMIT CAST(:limit AS int)
    FOR UPDATE SKIP LOCKED
)
RETURNING 1
