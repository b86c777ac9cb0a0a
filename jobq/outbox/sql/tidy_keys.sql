-- Delete idempotency keys that have expired and whose job is neither in the outbox nor dead.
DELETE FROM {schema}.idempotency_key
WHERE (scope, key) IN (
    SELECT scope, key
    FROM {schema}.idempotency_key AS held
    WHERE expires_at <= now()
        AND NOT EXISTS (SELECT FROM {schema}.outbox WHERE id = held.job_id)
        AND NOT EXISTS (SELECT FROM {schema}.dead WHERE id = held.job_id)
    ORDER BY scope, key
    LIMIT CAST(:limit AS int)
    FOR UPDATE SKIP LOCKED
)
RETURNING 1
