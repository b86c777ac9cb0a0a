-- Count the dead of each queue, in :percent of the table's pages (100: all of them, exactly).
SELECT queue, count(*)
FROM {schema}.dead TABLESAMPLE SYSTEM (CAST(:percent AS float8))
GROUP BY queue
