-- Which settings of this session write the parameters of statements, and so jobs' arguments, to the server's log.
SELECT name
FROM (
    VALUES
        ('log_statement', current_setting('log_statement') IN ('mod', 'all'), 'log_parameter_max_length'),
        (
            'log_min_duration_statement',
            current_setting('log_min_duration_statement') <> '-1',
            'log_parameter_max_length'
        ),
        (
            'log_parameter_max_length_on_error',
            current_setting('log_min_error_statement') <> 'panic',
            'log_parameter_max_length_on_error'
        )
) AS setting (name, is_on, length)
WHERE is_on AND current_setting(length) <> '0'
