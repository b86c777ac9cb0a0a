-- Prepared transactions of this database, the oldest first: name, owner, age in seconds, and whether they have written
-- to the outbox.
SELECT
    gid,
    owner,
    CAST(extract(epoch FROM clock_timestamp() - prepared) AS float8) AS age_s,
    EXISTS (
        SELECT FROM pg_locks AS own
        JOIN pg_locks AS held ON held.virtualtransaction = own.virtualtransaction
        WHERE own.locktype = 'transactionid' AND own.transactionid = transaction AND own.pid IS NULL
            AND held.relation = to_regclass('{schema}.outbox') AND held.mode = 'RowExclusiveLock' AND held.pid IS NULL
    ) AS has_jobs
FROM pg_prepared_xacts
WHERE database = current_database()
ORDER BY prepared
LIMIT 5
