-- Read a recovery point, and whether the job is still this run's: one that has moved on must not reach its next effect.
SELECT
    EXISTS (
        SELECT FROM {schema}.outbox WHERE id = CAST(:id AS uuid) AND generation = CAST(:generation AS int)
    ) AS is_current,
    (
        SELECT CAST(result AS text)
        FROM {schema}.step
        WHERE job_id = CAST(:id AS uuid) AND name = CAST(:name AS text)
    ) AS result
