-- One poll: the new snapshot, and by list the entries of rows that the last snapshot (xmax, xip) did not show.
-- One statement, so that rows and snapshot agree (MUST). Rows due later, up to the horizon, come with their delay
-- in seconds; rows beyond the horizon are left to timers.sql. `seen` counts rows, to tell when :limit cut the poll.
-- The upper bound keeps xids that another cluster wrote (dump and restore) from coming back at every poll.
WITH snapshot AS MATERIALIZED (SELECT pg_current_snapshot() AS taken),
fresh AS (
    SELECT id, generation, queue, priority, run_at
    FROM {schema}.outbox, snapshot
    WHERE (
        (xid >= CAST(:xmax AS xid8) AND xid < pg_snapshot_xmax(taken))
        OR xid = ANY (CAST(:xip AS xid8[]))
    )
    AND (run_at IS NULL OR run_at <= CAST(:horizon AS timestamptz))
    LIMIT CAST(:limit AS int)
),
lists AS (
    SELECT
        queue,
        priority,
        array_agg(replace(CAST(id AS text), '-', '') || ':' || generation || ':' || priority ORDER BY id) AS entries,
        array_agg(generation > 1 OR run_at IS NOT NULL ORDER BY id) AS again,
        array_agg(CAST(extract(epoch FROM run_at - clock_timestamp()) AS float8) ORDER BY id) AS delays
    FROM fresh
    GROUP BY queue, priority
)
SELECT
    pg_snapshot_xmax(taken), ARRAY(SELECT pg_snapshot_xip(taken)),
    queue, priority, entries, again, delays
FROM snapshot LEFT JOIN lists ON true
