-- Bound how long the janitor's statements may wait for a lock, and take.
SELECT
    set_config('lock_timeout', :lock, true),
    set_config('statement_timeout', :longest, true)
