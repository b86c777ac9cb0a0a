-- Read rows of a page again, after Redis said that it does not know them: their entries. Because acks follow commits,
-- a row that is still here at this moment is in no list of Redis.
SELECT ARRAY(
    SELECT replace(CAST(id AS text), '-', '') || ':' || generation || ':' || priority
    FROM {schema}.outbox
    WHERE id = ANY (CAST(:ids AS uuid[])) AND (run_at IS NULL OR run_at <= clock_timestamp())
    ORDER BY id
)
