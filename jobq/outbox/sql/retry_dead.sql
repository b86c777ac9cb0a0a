-- Bring dead jobs back: due at once, with all their attempts ahead of them. The new generation keeps old entries
-- and late runs from touching them. Recovery points stay, so a step that was done is not done again.
WITH asked AS (
    SELECT id
    FROM {schema}.dead
    WHERE id = ANY (CAST(:ids AS uuid[]))
    ORDER BY id
    FOR UPDATE
),
gone AS (
    DELETE FROM {schema}.dead
    USING asked
    WHERE dead.id = asked.id
    RETURNING dead.*
)
INSERT INTO {schema}.outbox (
    id, generation, queue, task, args, priority, max_attempts, timeout_s, created_at, headers, error_type, last_error
)
SELECT
    id, generation + 1, queue, task, args, priority, max_attempts, timeout_s, created_at, headers, error_type,
    last_error
FROM gone
RETURNING id
