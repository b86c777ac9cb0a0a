-- Whether the transaction that deleted the job's row is still the one that is open. An error where one of its
-- statements failed: its COMMIT would undo everything and say nothing.
SELECT CAST(pg_current_xact_id_if_assigned() AS text) IS NOT DISTINCT FROM :xid
