-- The database's clock, ahead by :ahead_s seconds.
SELECT clock_timestamp() + make_interval(secs => CAST(:ahead_s AS float8))
