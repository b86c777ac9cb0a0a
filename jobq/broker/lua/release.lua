#!lua flags=allow-oom
-- Give entries back unrun: from the working list to the front of their ready lists, order kept.
-- KEYS[1]     bell     (LIST)  doorbell
-- KEYS[2]     stats    (HASH)  counters
-- KEYS[3]     working  (LIST)  this worker's entries
-- KEYS[4..7]  ready    (LIST)  entries of priority 1..4
-- ARGV[1..]   entries, first fetched first
-- Returns the number given back. What is not in the working list any more was swept, and is left alone.
local back = 0
for i = #ARGV, 1, -1 do
  local priority = string.match(ARGV[i] .. ':', '^%x+:%d+:([1-4]):')
  if priority and redis.call('LPOS', KEYS[3], ARGV[i]) then
    redis.call('LPUSH', KEYS[3 + tonumber(priority)], ARGV[i])
    redis.call('LREM', KEYS[3], 1, ARGV[i])
    back = back + 1
  end
end
if back > 0 then
  redis.pcall('HINCRBY', KEYS[2], 'released', back)
  if redis.call('LPUSH', KEYS[1], 1) > 64 then
    redis.call('LTRIM', KEYS[1], 0, 63)
  end
end
return back
