#!lua flags=allow-oom
-- Renew a worker's lease, and compare what it owns with what Redis holds for it.
-- KEYS[1]  known    (HASH)  id -> generation
-- KEYS[2]  beats    (HASH)  worker -> counter
-- KEYS[3]  workers  (HASH)  worker -> JSON for people
-- KEYS[4]  stats    (HASH)  counters
-- KEYS[5]  working  (LIST)  this worker's entries
-- ARGV[1]  worker
-- ARGV[2]  counter, different at every beat
-- ARGV[3]  JSON for people
-- ARGV[4]  r, the number of entries to put back
-- ARGV[5 .. 4+r]   entries that the last beat missed too: put back if Redis still lacks them
-- ARGV[5+r ..]     all entries the worker owns
-- Returns {was the worker known (0 or 1), u, unknown entry ..., l, lost entry ..., m, missing entry ...}:
-- unknown: in the working list, not owned, the first 1000; lost: Redis knows a newer generation; missing: owned, and nowhere here.
-- A worker that was not known has lost everything with Redis: all it owns is put back at once.
local registered = redis.call('HEXISTS', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
if registered == 0 or redis.call('HEXISTS', KEYS[3], ARGV[1]) == 0 then
  redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
end
local first_owned = 5 + tonumber(ARGV[4])
local first_back, last_back = 5, first_owned - 1
if registered == 0 then
  first_back, last_back = first_owned, #ARGV
end

-- What Redis knows of an id; 0 for nothing, and for what no script of ours wrote (a job must not wait behind that).
local function newest(id)
  local value = redis.call('HGET', KEYS[1], id)
  return value and string.match(value, '^[1-9]%d*$') and tonumber(value) <= 2147483647 and tonumber(value) or 0
end

local working, here = redis.call('LRANGE', KEYS[5], 0, -1), {}
for _, entry in ipairs(working) do
  here[entry] = true
end
local back = 0
for i = first_back, last_back do
  local id, generation = string.match(ARGV[i], '^(%x+):(%d+)')
  if newest(id) < tonumber(generation) then
    if not here[ARGV[i]] then
      redis.call('RPUSH', KEYS[5], ARGV[i])
      here[ARGV[i]] = true
    end
    redis.call('HSET', KEYS[1], id, generation)
    back = back + 1
  end
end
if back > 0 then
  redis.pcall('HINCRBY', KEYS[4], 'reasserted', back)
end

local owned, unknown, lost, missing = {}, {}, {}, {}
for i = first_owned, #ARGV do
  owned[ARGV[i]] = true
  local id, generation = string.match(ARGV[i], '^(%x+):(%d+)')
  local now = newest(id)
  if now > tonumber(generation) then
    lost[#lost + 1] = ARGV[i]
  elseif now < tonumber(generation) then
    missing[#missing + 1] = ARGV[i]
  end
end
for _, entry in ipairs(working) do
  if not owned[entry] and #unknown < 1000 then
    unknown[#unknown + 1] = entry
  end
end

local reply = {registered}
for _, list in ipairs({unknown, lost, missing}) do
  reply[#reply + 1] = #list
  for _, entry in ipairs(list) do
    reply[#reply + 1] = entry
  end
end
return reply
