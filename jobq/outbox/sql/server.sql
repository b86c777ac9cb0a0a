-- What doctor asks of the server itself.
SELECT
    current_setting('server_version'),
    CAST(current_setting('server_version_num') AS int),
    current_setting('fsync') = 'on'
