-- Name the backend after its worker, so that a sweeper can end it, and bound how long it may wait or idle.
SELECT
    set_config('application_name', :name, true),
    set_config('lock_timeout', :lock, true),
    set_config('idle_in_transaction_session_timeout', :idle, true)
