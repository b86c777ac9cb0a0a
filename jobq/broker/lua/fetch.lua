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
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then
  redis.pcall('HINCRBY', KEYS[4], 'fenced', 1)
  return {-1}
end
local wanted, dropped, moved, reply = tonumber(ARGV[2]), 0, 0, {0}
for i = 6, 9 do
  while moved < wanted and dropped < 4 * wanted + 100 do
    local entry = redis.call('LMOVE', KEYS[i], KEYS[5], 'LEFT', 'RIGHT')
    if not entry then
      break
    end
    local id, generation = string.match(entry .. ':', '^(%x+):(%d+):[1-4]:')
    if id and redis.call('HGET', KEYS[1], id) == generation then
      moved = moved + 1
      reply[moved + 1] = entry
    else
      redis.call('RPOP', KEYS[5])
      redis.pcall('HINCRBY', KEYS[4], id and 'stale' or 'garbage', 1)
      dropped = dropped + 1
    end
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
if moved > 0 then
  redis.pcall('HINCRBY', KEYS[4], 'fetched', moved)
end
reply[1] = left
return reply
