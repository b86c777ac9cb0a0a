-- Give a lock of try_lock.sql back.
SELECT pg_advisory_unlock(CAST(:space AS int), hashtext(CAST(:schema_name AS text)))
