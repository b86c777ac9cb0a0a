#!lua flags=allow-oom
-- Forget settled entries. Sent after the commit that settled them, never before (MUST).
-- KEYS[1]   known    (HASH)  id -> generation
-- KEYS[2]   stats    (HASH)  counters
-- KEYS[3]   working  (LIST)  this worker's entries
-- ARGV[1]   counter: acked, ghost, rewound or garbage
-- ARGV[2..] entries, as they stand in the list
-- Returns the number of entries that were still in the working list. An id that Redis knows at a newer generation
-- stays known: a late ack must not erase a retry. known goes first: an aborted script leaves an extra, no hole.
local removed = 0
for i = 2, #ARGV do
  local id, generation = string.match(ARGV[i], '^(%x+):(%d+)')
  if id then
    local now = tonumber(redis.call('HGET', KEYS[1], id) or 0) or 0
    if now <= tonumber(generation) then
      redis.call('HDEL', KEYS[1], id)
    end
  end
  removed = removed + redis.call('LREM', KEYS[3], 1, ARGV[i])
end
redis.pcall('HINCRBY', KEYS[2], ARGV[1], #ARGV - 1)
return removed
