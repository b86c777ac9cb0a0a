-- One page of the walk: the next :limit rows by id after :after, each with whether it has been due for :overdue_s.
-- Key order and no other condition, so that a page costs the same wherever it lies.
SELECT
    id, generation, queue, priority,
    (run_at IS NULL OR run_at <= clock_timestamp() - make_interval(secs => CAST(:overdue_s AS float8))) AS due
FROM {schema}.outbox
WHERE id > CAST(:after AS uuid)
ORDER BY id
LIMIT CAST(:limit AS int)
