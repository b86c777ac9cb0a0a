-- Write many intents that differ in their arguments only. Otherwise as enqueue.sql.
INSERT INTO {schema}.outbox (id, queue, task, args, priority, run_at, max_attempts, timeout_s, headers)
SELECT
    id,
    CAST(:queue AS text),
    CAST(:task AS text),
    CAST(args AS json),
    CAST(:priority AS smallint),
    CASE
        WHEN CAST(:delay_s AS float8) > 0 THEN statement_timestamp() + make_interval(secs => CAST(:delay_s AS float8))
        WHEN CAST(:run_at AS timestamptz) > statement_timestamp() THEN CAST(:run_at AS timestamptz)
    END,
    CAST(:max_attempts AS smallint),
    CAST(:timeout_s AS float8),
    CAST(CAST(:headers AS text) AS json)
FROM unnest(CAST(:ids AS uuid[]), CAST(:args AS text[])) AS t (id, args)
