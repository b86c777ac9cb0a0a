#!lua flags=allow-oom
-- Forget settled entries. Sent after the commit that settled them, never before (MUST).
-- KEYS[1]   known    (HASH)  id -> generation
-- KEYS[2]   stats    (HASH)  counters
-- KEYS[3]   working  (LIST)  this worker's entries
-- ARGV[1]   counter: acked, ghost, rewound, stale or garbage
-- ARGV[2..] entries, as they stand in the list
-- Returns the number of entries that were still in the working list. An id that Redis knows at a newer generation
-- stays known: a late ack must not erase a retry. known goes first: an aborted script leaves an extra, no hole.
-- What Redis knows of an id; 0 for nothing, and for what no script of ours wrote (a job must not wait behind that).
local function newest(id)
  local value = redis.call('HGET', KEYS[1], id)
  return value and string.match(value, '^[1-9]%d*$') and tonumber(value) <= 2147483647 and tonumber(value) or 0
end
local removed = 0
for i = 2, #ARGV do
  local id, generation = string.match(ARGV[i] .. ':', '^(%x+):(%d+):[1-4]:')
  if id then
    if newest(id) <= tonumber(generation) then
      redis.call('HDEL', KEYS[1], id)
    end
  end
  removed = removed + redis.call('LREM', KEYS[3], 1, ARGV[i])
end
redis.pcall('HINCRBY', KEYS[2], ARGV[1], #ARGV - 1)
return removed
