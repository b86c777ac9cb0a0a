-- Complete jobs: delete their rows if they are still at the generation that ran.
-- Locked in id order, rows locked elsewhere passed over: one locked row stops no batch, two batches never deadlock.
WITH ended AS (
    SELECT outbox.id, outbox.generation
    FROM {schema}.outbox
    JOIN unnest(CAST(:ids AS uuid[]), CAST(:generations AS int[])) AS asked (id, generation)
        ON outbox.id = asked.id AND outbox.generation = asked.generation
    ORDER BY outbox.id
    FOR UPDATE OF outbox SKIP LOCKED
)
DELETE FROM {schema}.outbox
USING ended
WHERE outbox.id = ended.id AND outbox.generation = ended.generation
RETURNING outbox.id
