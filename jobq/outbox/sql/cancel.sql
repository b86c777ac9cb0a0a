-- Cancel one job that is not done.
DELETE FROM {schema}.outbox WHERE id = CAST(:id AS uuid) RETURNING id
