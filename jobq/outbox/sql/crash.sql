-- Count a crash for jobs whose worker died while it held them: a new generation, once, whoever sweeps first.
-- xid stays: the sweeper puts the new entry into Redis itself, so the poll need not see the row. Looked up and locked
-- as in complete.sql.
UPDATE {schema}.outbox
SET generation = generation + 1, crashes = crashes + 1
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
