-- Complete one job inside the transaction of its effects. Waits for the row's lock (lock_timeout bounds it), so
-- that a second run of the same job stands still here until the first has committed or rolled back.
-- The settings hold until the transaction ends, and are made before the row is locked. They name the backend after its
-- worker, so that a sweeper can end it; bound how long it may wait or idle; and have the server notice within about ten
-- seconds that this client is gone without a word, and let go of the row: it takes no session for idle whose statement
-- was prepared and not executed.
WITH settings AS MATERIALIZED (
    SELECT
        set_config('application_name', :name, true),
        set_config('lock_timeout', :lock, true),
        set_config('idle_in_transaction_session_timeout', :idle, true),
        set_config('tcp_keepalives_idle', '5', true),
        set_config('tcp_keepalives_interval', '2', true),
        set_config('tcp_user_timeout', '10000', true)
)
DELETE FROM {schema}.outbox
USING settings
WHERE id = CAST(:id AS uuid) AND generation = CAST(:generation AS int)
RETURNING CAST(pg_current_xact_id() AS text)
