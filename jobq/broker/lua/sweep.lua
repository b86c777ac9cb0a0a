#!lua flags=allow-oom
-- Take back the entries of a worker whose counter stood still for a lease, and forget the worker.
-- KEYS[1]     known    (HASH)  id -> generation
-- KEYS[2]     beats    (HASH)  worker -> counter
-- KEYS[3]     workers  (HASH)  worker -> JSON for people
-- KEYS[4]     bell     (LIST)  doorbell
-- KEYS[5]     stats    (HASH)  counters
-- KEYS[6]     working  (LIST)  the dead worker's entries
-- KEYS[7..10] ready    (LIST)  entries of priority 1..4
-- ARGV[1]     worker
-- ARGV[2]     counter that stood still; empty for a worker that has none
-- ARGV[3..]   pairs: entry, the generation its row has now, or 0 for a row that is gone or not due
-- Returns {-1} when the counter has moved (the worker lives), else {taken back, dropped}. New generations go to the
-- front of ready, unless Redis knows that one or a newer; entries not mentioned go there as they are. A row that is
-- older than its entry (PostgreSQL lost a commit) has its own generation put back, or Redis would know one for ever
-- that is in no list, and refuse the row's. A worker that stops sweeps itself when it holds nothing any more: that is
-- no repair, and is not counted.
if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= ARGV[2] then
  return {-1}
end
-- What Redis knows of an id; 0 for nothing, and for what no script of ours wrote (a job must not wait behind that).
local function newest(id)
  local value = redis.call('HGET', KEYS[1], id)
  return value and string.match(value, '^[1-9]%d*$') and tonumber(value) <= 2147483647 and tonumber(value) or 0
end
local standing = {}
for i = 3, #ARGV, 2 do
  standing[ARGV[i]] = tonumber(ARGV[i + 1])
end
local working, swept, dropped = redis.call('LRANGE', KEYS[6], 0, -1), 0, 0
for i = #working, 1, -1 do
  local entry = working[i]
  local id, generation, priority = string.match(entry .. ':', '^(%x+):(%d+):([1-4]):')
  local now = id and newest(id)
  local current = standing[entry]
  if not id then
    dropped = dropped + 1
  elseif current == nil or current == tonumber(generation) then
    if now == tonumber(generation) then
      redis.call('LPUSH', KEYS[6 + tonumber(priority)], entry)
      swept = swept + 1
    end
  elseif current == 0 then
    if now <= tonumber(generation) then
      redis.call('HDEL', KEYS[1], id)
    end
    dropped = dropped + 1
  elseif now < current or now == tonumber(generation) then
    redis.call('LPUSH', KEYS[6 + tonumber(priority)], id .. ':' .. current .. ':' .. priority)
    redis.call('HSET', KEYS[1], id, current)
    swept = swept + 1
  end
end
redis.call('DEL', KEYS[6])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
if #working > 0 then
  redis.pcall('HINCRBY', KEYS[5], 'sweeps', 1)
end
if swept > 0 then
  redis.pcall('HINCRBY', KEYS[5], 'swept', swept)
  if redis.call('LPUSH', KEYS[4], 1) > 64 then
    redis.call('LTRIM', KEYS[4], 0, 63)
  end
end
return {swept, dropped}
