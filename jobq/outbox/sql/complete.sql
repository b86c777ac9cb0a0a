-- Complete jobs: delete their rows if they are still at the generation that ran.
-- Locked in id order, rows locked elsewhere passed over: one locked row stops no batch, two batches never deadlock.
-- LATERAL and ctid leave the planner no choice but to look each row up. Statistics taken while a large transaction was
-- filling the table say that it is empty, and then a join reads all of it for each batch. The locks hold the ctid in
-- place; a row that changed just before them has another one, and is passed over too.
DELETE FROM {schema}.outbox
WHERE ctid = ANY (ARRAY(
    SELECT found.ctid
    FROM (
        SELECT id, generation
        FROM unnest(CAST(:ids AS uuid[]), CAST(:generations AS int[])) AS asked (id, generation)
        ORDER BY id
    ) AS asked
    CROSS JOIN LATERAL (
        SELECT outbox.ctid
        FROM {schema}.outbox
        WHERE outbox.id = asked.id AND outbox.generation = asked.generation
        FOR UPDATE SKIP LOCKED
    ) AS found
))
RETURNING id
