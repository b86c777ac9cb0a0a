-- Rows that come due after :after and up to :horizon, soonest first, with their delay in seconds.
SELECT
    queue, priority,
    replace(CAST(id AS text), '-', '') || ':' || generation || ':' || priority AS entry,
    CAST(extract(epoch FROM run_at - clock_timestamp()) AS float8) AS delay_s,
    run_at
FROM {schema}.outbox
WHERE run_at > CAST(:after AS timestamptz) AND run_at <= CAST(:horizon AS timestamptz)
ORDER BY run_at
LIMIT CAST(:limit AS int)
