-- How many pages a table fills: what a count over all of it would have to read.
SELECT pg_relation_size(to_regclass('{schema}.' || CAST(:table_name AS text))) / CAST(current_setting('block_size') AS int8)
