-- Delete the dead that nobody came for in :kept_s seconds.
DELETE FROM {schema}.dead
WHERE id IN (
    SELECT id
    FROM {schema}.dead
    WHERE died_at < now() - make_interval(secs => CAST(:kept_s AS float8))
    ORDER BY died_at
    LIMIT CAST(:limit AS int)
    FOR UPDATE SKIP LOCKED
)
RETURNING 1
