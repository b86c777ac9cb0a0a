-- Keep the result of a recovery point, unless there is one, and return what is kept: runs side by side go on with one.
-- The update changes nothing. A conflict that did nothing would return no row, and a row that another run has just
-- committed is not in this statement's snapshot.
INSERT INTO {schema}.step AS point (job_id, name, result)
VALUES (CAST(:id AS uuid), CAST(:name AS text), CAST(CAST(:result AS text) AS json))
ON CONFLICT (job_id, name) DO UPDATE SET result = point.result
RETURNING CAST(result AS text)
