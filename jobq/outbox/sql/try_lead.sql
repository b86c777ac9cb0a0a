-- Try for the leader's lock; it lasts as long as the session.
SELECT pg_try_advisory_lock(CAST(:space AS int), hashtext(CAST(:schema_name AS text)))
