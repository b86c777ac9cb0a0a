-- Name the backend after its worker, so that a sweeper can end it, and bound how long it may wait or idle. Have the
-- server notice within about ten seconds that this client is gone without a word, and let go of the row: it takes no
-- session for idle whose statement was prepared and not executed.
SELECT
    set_config('application_name', :name, true),
    set_config('lock_timeout', :lock, true),
    set_config('idle_in_transaction_session_timeout', :idle, true),
    set_config('tcp_keepalives_idle', '5', true),
    set_config('tcp_keepalives_interval', '2', true),
    set_config('tcp_user_timeout', '10000', true)
