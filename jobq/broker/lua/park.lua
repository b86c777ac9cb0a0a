#!lua flags=allow-oom
-- Set entries aside whose task no worker here knows, until one that does comes by.
-- KEYS[1]  working        (LIST)  this worker's entries
-- KEYS[2]  parked:<task>  (LIST)  entries that wait for a worker with this task
-- KEYS[3]  stats          (HASH)  counters
-- ARGV[1..] entries
-- Returns the number parked. What is not in the working list any more was swept, and is left alone.
local parked = 0
for i = 1, #ARGV do
  if redis.call('LPOS', KEYS[1], ARGV[i]) then
    redis.call('RPUSH', KEYS[2], ARGV[i])
    redis.call('LREM', KEYS[1], 1, ARGV[i])
    parked = parked + 1
  end
end
redis.pcall('HINCRBY', KEYS[3], 'parked', parked)
return parked
