-- What autovacuum may do for the outbox: whether the server runs it, and whether the table was left out.
SELECT
    current_setting('autovacuum') = 'on' AND current_setting('track_counts') = 'on' AS runs,
    'autovacuum_enabled=false' = ANY (coalesce(reloptions, '{}')) AS is_left_out
FROM pg_class
WHERE oid = to_regclass('{schema}.outbox')
