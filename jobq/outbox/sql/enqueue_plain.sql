-- Write one intent without options, as most are: SQLAlchemy takes its time for each parameter.
INSERT INTO {schema}.outbox (id, queue, task, args)
VALUES (CAST(:id AS uuid), CAST(:queue AS text), CAST(:task AS text), CAST(CAST(:args AS text) AS json))
