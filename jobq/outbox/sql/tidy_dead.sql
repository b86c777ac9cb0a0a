-- Delete the dead that nobody came for in :kept_s seconds.
-- MATERIALIZED: a subquery could be run once for each row that it is joined to, and its LIMIT with it.
WITH gone AS MATERIALIZED (
    SELECT id
    FROM {schema}.dead
    WHERE died_at < now() - make_interval(secs => CAST(:kept_s AS float8))
    ORDER BY died_at
    LIMIT CAST(:limit AS int)
    FOR UPDATE SKIP LOCKED
)
DELETE FROM {schema}.dead
USING gone
WHERE dead.id = gone.id
RETURNING 1
