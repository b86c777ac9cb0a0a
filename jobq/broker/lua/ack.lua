#!lua flags=allow-oom
-- Forget settled entries. Sent after the commit that settled them, never before (MUST).
-- KEYS[1]   known    (HASH)  id -> generation
-- KEYS[2]   stats    (HASH)  counters
-- KEYS[3]   working  (LIST)  this worker's entries
-- ARGV[1]   counter: acked, ghost, rewound, stale or garbage
-- ARGV[2..] entries, as they stand in the list
-- Returns the number of entries that were still in the working list. An id that Redis knows at a newer generation
-- stays known: a late ack must not erase a retry. known goes first: an aborted script leaves an extra, no hole.
-- What a value of known says; 0 for nothing, and for what no script of ours wrote (a job must not wait behind that).
local function generation_of(value)
  return value and string.match(value, '^[1-9]%d*$') and tonumber(value) <= 2147483647 and tonumber(value) or 0
end
local at_a_time = 1000 -- what Lua hands to one call has a limit of some 8000
local match, sub = string.match, string.sub
for first = 2, #ARGV, at_a_time do
  local ids, generations, n = {}, {}, 0
  for i = first, math.min(first + at_a_time - 1, #ARGV) do
    local entry = ARGV[i]
    local id, generation, after = match(entry, '^(%x+):(%d+):[1-4]()')
    if id and (after > #entry or sub(entry, after, after) == ':') then
      n = n + 1
      ids[n], generations[n] = id, generation
    end
  end
  local settled = {}
  if n > 0 then
    for i, value in ipairs(redis.call('HMGET', KEYS[1], unpack(ids))) do
      if value == generations[i] or generation_of(value) <= tonumber(generations[i]) then
        settled[#settled + 1] = ids[i]
      end
    end
  end
  if #settled > 0 then
    redis.call('HDEL', KEYS[1], unpack(settled))
  end
end

-- Jobs that are as short as each other end in the order they came: those go in one piece.
local head, same = redis.call('LRANGE', KEYS[3], 0, #ARGV - 2), 0
while same < #head and head[same + 1] == ARGV[same + 2] do
  same = same + 1
end
local removed = same
if same > 0 then
  redis.call('LTRIM', KEYS[3], same, -1)
end
for i = same + 2, #ARGV do
  removed = removed + redis.call('LREM', KEYS[3], 1, ARGV[i])
end
redis.pcall('HINCRBY', KEYS[2], ARGV[1], #ARGV - 1)
return removed
