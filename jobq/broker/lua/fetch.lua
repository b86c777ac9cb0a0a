#!lua flags=allow-oom
-- Move up to n entries to the tail of the worker's working list, most urgent first.
-- KEYS[1]     known    (HASH)   id -> generation
-- KEYS[2]     beats    (HASH)   worker -> counter
-- KEYS[3]     bell     (LIST)   doorbell
-- KEYS[4]     stats    (HASH)   counters
-- KEYS[5]     working  (LIST)   this worker's entries
-- KEYS[6..9]  ready    (LIST)   entries of priority 1..4
-- ARGV[1]     worker
-- ARGV[2]     n (entries)
-- Returns {-1} for a worker without a heartbeat (fenced), else {entries left in ready, entry ...}. Entries that
-- are not at the generation Redis knows are stale or garbage and are dropped on the way, a bounded number a call.
-- An aborted script leaves an entry in both lists, and none in neither: it goes into working first.
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then
  redis.pcall('HINCRBY', KEYS[4], 'fenced', 1)
  return {-1}
end
local at_a_time = 1000 -- what Lua hands to one call has a limit of some 8000

-- Take n entries off a ready list; returns how many came off it, those to run, and counts what is dropped.
local drops = {stale = 0, garbage = 0}
local function take(ready, n)
  local entries, ids, generations = redis.call('LRANGE', ready, 0, n - 1), {}, {}
  for i, entry in ipairs(entries) do
    local id, generation, after = string.match(entry, '^(%x+):(%d+):[1-4]()')
    local is_whole = id and (after > #entry or string.sub(entry, after, after) == ':')
    ids[i], generations[i] = is_whole and id or '', is_whole and generation
  end
  local good = {}
  if #entries > 0 then
    local known = redis.call('HMGET', KEYS[1], unpack(ids))
    for i, entry in ipairs(entries) do
      if generations[i] and known[i] == generations[i] then
        good[#good + 1] = entry
      else
        local kind = generations[i] and 'stale' or 'garbage'
        drops[kind] = drops[kind] + 1
      end
    end
    if #good > 0 then
      redis.call('RPUSH', KEYS[5], unpack(good))
    end
    redis.call('LTRIM', ready, #entries, -1)
  end
  return #entries, good
end

local wanted, reply = tonumber(ARGV[2]), {0}
for i = 6, 9 do
  while #reply <= wanted and drops.stale + drops.garbage < 4 * wanted + 100 do
    local taken, good = take(KEYS[i], math.min(wanted - #reply + 1, at_a_time))
    if taken == 0 then
      break
    end
    for _, entry in ipairs(good) do
      reply[#reply + 1] = entry
    end
  end
end
for kind, count in pairs(drops) do
  if count > 0 then
    redis.pcall('HINCRBY', KEYS[4], kind, count)
  end
end
local left = 0
for i = 6, 9 do
  left = left + redis.call('LLEN', KEYS[i])
end
if left == 0 then
  redis.call('DEL', KEYS[3])
elseif redis.call('LPUSH', KEYS[3], 1) > 64 then
  redis.call('LTRIM', KEYS[3], 0, 63)
end
if #reply > 1 then
  redis.pcall('HINCRBY', KEYS[4], 'fetched', #reply - 1)
end
reply[1] = left
return reply
