-- Try for a lock of the relay, without waiting; it lasts as long as the session, or until unlock.sql.
SELECT pg_try_advisory_lock(CAST(:space AS int), hashtext(CAST(:schema_name AS text)))
