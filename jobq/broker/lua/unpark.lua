#!lua flags=allow-oom
-- Put parked entries of tasks that this worker knows back into ready, a bounded number a call.
-- KEYS[1]     bell     (LIST)  doorbell
-- KEYS[2]     stats    (HASH)  counters
-- KEYS[3..6]  ready    (LIST)  entries of priority 1..4
-- KEYS[7..]   parked:<task>  (LIST)  entries that wait for a worker with this task
-- ARGV[1]     n (entries)
-- Returns the number put back.
local back = 0
for i = 7, #KEYS do
  while back < tonumber(ARGV[1]) do
    local entry = redis.call('LINDEX', KEYS[i], 0)
    if not entry then
      break
    end
    local priority = string.match(entry .. ':', '^%x+:%d+:([1-4]):')
    if priority then
      redis.call('RPUSH', KEYS[2 + tonumber(priority)], entry)
      back = back + 1
    end
    redis.call('LPOP', KEYS[i])
  end
end
if back > 0 then
  redis.pcall('HINCRBY', KEYS[2], 'unparked', back)
  if redis.call('LPUSH', KEYS[1], 1) > 64 then
    redis.call('LTRIM', KEYS[1], 0, 63)
  end
end
return back
