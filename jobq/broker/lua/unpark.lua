#!lua flags=allow-oom
-- Take up parked entries of tasks that this worker knows, a bounded number a call: as many as it has room for go
-- straight to its working list, since from ready a worker that does not know the task may park them again and again.
-- KEYS[1]     known    (HASH)  id -> generation
-- KEYS[2]     beats    (HASH)  worker -> counter
-- KEYS[3]     bell     (LIST)  doorbell
-- KEYS[4]     stats    (HASH)  counters
-- KEYS[5]     working  (LIST)  this worker's entries
-- KEYS[6..9]  ready    (LIST)  entries of priority 1..4
-- KEYS[10..]  parked:<task>  (LIST)  entries that wait for a worker with this task
-- ARGV[1]     worker
-- ARGV[2]     n (entries)
-- ARGV[3]     room (entries): of these n, how many the worker can start now
-- Returns {put back into ready or dropped as garbage, entry that is in the working list now ...}. A worker without a heartbeat gets none,
-- since nobody would sweep it; and what is not at the generation that Redis knows goes to ready, where fetch drops it.
local room = redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 and tonumber(ARGV[3]) or 0
local back, taken, dropped, reply = 0, 0, 0, {0}
for i = 10, #KEYS do
  while back + taken + dropped < tonumber(ARGV[2]) do
    local entry = redis.call('LINDEX', KEYS[i], 0)
    if not entry then
      break
    end
    local id, generation, priority = string.match(entry .. ':', '^(%x+):(%d+):([1-4]):')
    if id and taken < room and redis.call('HGET', KEYS[1], id) == generation then
      redis.call('RPUSH', KEYS[5], entry)
      taken = taken + 1
      reply[taken + 1] = entry
    elseif id then
      redis.call('RPUSH', KEYS[5 + tonumber(priority)], entry)
      back = back + 1
    else
      dropped = dropped + 1
    end
    redis.call('LPOP', KEYS[i])
  end
end
if back + taken > 0 then
  redis.pcall('HINCRBY', KEYS[4], 'unparked', back + taken)
end
if dropped > 0 then
  redis.pcall('HINCRBY', KEYS[4], 'garbage', dropped)
end
if back > 0 and redis.call('LPUSH', KEYS[3], 1) > 64 then
  redis.call('LTRIM', KEYS[3], 0, 63)
end
reply[1] = back + dropped
return reply
