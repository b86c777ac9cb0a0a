-- Count a crash for jobs whose worker died while it held them: a new generation, once, whoever sweeps first.
-- xid stays: the sweeper puts the new entry into Redis itself, so the poll need not see the row. Locked as in
-- complete.sql.
WITH ended AS (
    SELECT outbox.id, outbox.generation
    FROM {schema}.outbox
    JOIN unnest(CAST(:ids AS uuid[]), CAST(:generations AS int[])) AS asked (id, generation)
        ON outbox.id = asked.id AND outbox.generation = asked.generation
    ORDER BY outbox.id
    FOR UPDATE OF outbox SKIP LOCKED
)
UPDATE {schema}.outbox
SET generation = outbox.generation + 1, crashes = outbox.crashes + 1
FROM ended
WHERE outbox.id = ended.id AND outbox.generation = ended.generation
RETURNING outbox.id
