-- Connections that this role could still open, by each limit that holds for it: of the server, the database, the role.
-- A limit below zero is none.
WITH used AS (
    SELECT
        count(*) AS everywhere,
        count(*) FILTER (WHERE datname = current_database()) AS here,
        count(*) FILTER (WHERE usename = current_user) AS mine
    FROM pg_stat_activity
    WHERE backend_type IS NULL OR backend_type = 'client backend'
)
SELECT
    'max_connections' AS which,
    CAST(current_setting('max_connections') AS int8)
        - CAST(current_setting('superuser_reserved_connections') AS int8)
        - CAST(coalesce(nullif(current_setting('reserved_connections', true), ''), '0') AS int8) AS allowed,
    everywhere AS used
FROM used
UNION ALL
SELECT 'the database''s CONNECTION LIMIT', datconnlimit, here
FROM used, pg_database
WHERE datname = current_database() AND datconnlimit >= 0
UNION ALL
SELECT 'the role''s CONNECTION LIMIT', rolconnlimit, mine
FROM used, pg_roles
WHERE rolname = current_user AND rolconnlimit >= 0
