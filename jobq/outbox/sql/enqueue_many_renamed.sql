-- Write many intents as enqueue_many.sql does, where some are of tasks with former names. Parameters beside its own:
-- pairs of a job with a key and one of its task's former names. Apart from it, since most statements have none.
-- A renamed task claims its keys under its former names first and then under its own, for one and the same job. An
-- older release, which knows the former name only, meets the claim there. Where transactions that know different
-- names meet at the same moment, a claim may be answered with another's job after one was made: the job is written
-- then, since a key must not lead to a job that never was.
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
former AS MATERIALIZED (
    SELECT
        asked.id, asked.task, t.name, asked.key,
        statement_timestamp() + make_interval(secs => asked.ttl_s) AS expires_at
    FROM unnest(CAST(:renamed AS uuid[]), CAST(:former_names AS text[])) AS t (id, name)
    JOIN asked ON asked.id = t.id
),
live AS MATERIALIZED (
    SELECT DISTINCT ON (named.id) named.id, held.job_id, held.expires_at
    FROM (
        SELECT id, name, key, 1 AS place FROM former
        UNION ALL
        SELECT id, task, key, 0 FROM former
    ) AS named
    JOIN {schema}.idempotency_key AS held ON held.scope = named.name AND held.key = named.key
    WHERE held.expires_at > statement_timestamp()
        OR EXISTS (SELECT FROM {schema}.outbox WHERE id = held.job_id)
        OR EXISTS (SELECT FROM {schema}.dead WHERE id = held.job_id)
    ORDER BY named.id, named.place, named.name COLLATE "C"
),
claimed_before AS (
    INSERT INTO {schema}.idempotency_key AS held (scope, key, job_id, expires_at)
    SELECT former.name, former.key, coalesce(live.job_id, former.id), coalesce(live.expires_at, former.expires_at)
    FROM former
    LEFT JOIN live ON live.id = former.id
    ORDER BY former.name COLLATE "C", former.key COLLATE "C"
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
    RETURNING scope, key, job_id, expires_at
),
before AS MATERIALIZED (
    SELECT DISTINCT ON (former.id)
        former.id, claimed.job_id, claimed.expires_at, bool_or(claimed.job_id = former.id) OVER of_job AS is_new
    FROM former
    JOIN claimed_before AS claimed ON claimed.scope = former.name AND claimed.key = former.key
    WINDOW of_job AS (PARTITION BY former.id)
    ORDER BY former.id, claimed.job_id = former.id
),
claimed AS (
    INSERT INTO {schema}.idempotency_key AS held (scope, key, job_id, expires_at)
    SELECT
        asked.task, asked.key, coalesce(before.job_id, asked.id),
        coalesce(before.expires_at, statement_timestamp() + make_interval(secs => asked.ttl_s))
    FROM asked
    LEFT JOIN before ON before.id = asked.id
    WHERE asked.key IS NOT NULL
    ORDER BY asked.task COLLATE "C", asked.key COLLATE "C"
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
answer AS MATERIALIZED (
    SELECT
        asked.id, asked.place, claimed.job_id,
        coalesce(before.is_new, false) OR claimed.job_id = asked.id AS is_new
    FROM claimed
    JOIN asked ON claimed.scope = asked.task AND claimed.key = asked.key
    LEFT JOIN before ON before.id = asked.id
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
    LEFT JOIN answer ON answer.id = asked.id
    WHERE asked.key IS NULL OR answer.is_new
)
SELECT CASE WHEN is_new THEN id ELSE job_id END AS id, is_new AS created
FROM answer
ORDER BY place
