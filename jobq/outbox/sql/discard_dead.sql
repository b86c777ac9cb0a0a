-- Forget dead jobs. Their recovery points are left to the janitor.
WITH asked AS (
    SELECT id
    FROM {schema}.dead
    WHERE id = ANY (CAST(:ids AS uuid[]))
    ORDER BY id
    FOR UPDATE
)
DELETE FROM {schema}.dead
USING asked
WHERE dead.id = asked.id
RETURNING dead.id
