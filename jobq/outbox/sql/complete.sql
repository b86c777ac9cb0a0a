-- Complete jobs: delete their rows if they are still at the generation that ran.
-- Locked in id order, rows locked elsewhere passed over: one locked row stops no batch, two batches never deadlock.
-- Deleted by ctid, which the locks hold in place: what changed just before them is passed over too.
DELETE FROM {schema}.outbox
WHERE ctid = ANY (ARRAY(
    SELECT outbox.ctid
    FROM {schema}.outbox
    JOIN unnest(CAST(:ids AS uuid[]), CAST(:generations AS int[])) AS asked (id, generation)
        ON outbox.id = asked.id AND outbox.generation = asked.generation
    ORDER BY outbox.id
    FOR UPDATE OF outbox SKIP LOCKED
))
RETURNING id
