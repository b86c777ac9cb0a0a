-- Write many intents in one statement. Returns for each with an idempotency key, in the order given, the job that has
-- the key, and whether that is the new one.
-- Keys are claimed in the order of their bytes, in which the caller has cut the statements too: two transactions
-- with the same keys then wait for each other and do not deadlock.
-- A key changes hands only when it has expired and its job is neither in the outbox nor dead. Both are looked up as
-- of the start of this statement, so a key that another transaction took since then stays with that one.
WITH asked AS MATERIALIZED (
    SELECT *
    FROM unnest(
        CAST(:ids AS uuid[]), CAST(:queues AS text[]), CAST(:tasks AS text[]), CAST(:args AS text[]),
        CAST(:priorities AS smallint[]), CAST(:delays_s AS float8[]), CAST(:runs_at AS timestamptz[]),
        CAST(:max_attempts AS smallint[]), CAST(:timeouts_s AS float8[]), CAST(:headers AS text[]),
        CAST(:keys AS text[]), CAST(:ttls_s AS float8[])
    ) WITH ORDINALITY AS t (
        id, queue, task, args, priority, delay_s, run_at, max_attempts, timeout_s, headers, key, ttl_s, place
    )
),
claimed AS (
    INSERT INTO {schema}.idempotency_key AS held (scope, key, job_id, expires_at)
    SELECT task, key, id, statement_timestamp() + make_interval(secs => ttl_s)
    FROM asked
    WHERE key IS NOT NULL
    ORDER BY task COLLATE "C", key COLLATE "C"
    ON CONFLICT (scope, key) DO UPDATE SET (job_id, expires_at) = (
        SELECT
            CASE WHEN expired THEN excluded.job_id ELSE held.job_id END,
            CASE WHEN expired THEN excluded.expires_at ELSE held.expires_at END
        FROM (
            SELECT
                held.expires_at <= statement_timestamp()
                AND EXISTS (
                    SELECT FROM {schema}.idempotency_key AS seen
                    WHERE seen.scope = held.scope AND seen.key = held.key AND seen.job_id = held.job_id
                )
                AND NOT EXISTS (SELECT FROM {schema}.outbox WHERE id = held.job_id)
                AND NOT EXISTS (SELECT FROM {schema}.dead WHERE id = held.job_id) AS expired
        ) AS state
    )
    RETURNING scope, key, job_id
),
added AS (
    INSERT INTO {schema}.outbox (id, queue, task, args, priority, run_at, max_attempts, timeout_s, headers)
    SELECT
        asked.id, asked.queue, asked.task, CAST(asked.args AS json), asked.priority,
        CASE
            WHEN asked.delay_s > 0 THEN statement_timestamp() + make_interval(secs => asked.delay_s)
            WHEN asked.run_at > statement_timestamp() THEN asked.run_at
        END,
        asked.max_attempts, asked.timeout_s, CAST(asked.headers AS json)
    FROM asked
    LEFT JOIN claimed ON claimed.scope = asked.task AND claimed.key = asked.key
    WHERE asked.key IS NULL OR claimed.job_id = asked.id
)
SELECT claimed.job_id AS id, claimed.job_id = asked.id AS created
FROM claimed
JOIN asked ON claimed.scope = asked.task AND claimed.key = asked.key
ORDER BY asked.place
