-- Where the relay begins: what is committed from now on is new to the first poll, the rest is left to the walk.
-- The horizon is the database's clock plus the look-ahead.
SELECT
    pg_snapshot_xmax(snapshot) AS xmax,
    ARRAY(SELECT pg_snapshot_xip(snapshot)) AS xip,
    clock_timestamp() AS now
FROM (SELECT pg_current_snapshot() AS snapshot) AS s
