#!lua
-- Reliable push: make entries reachable, unless Redis knows their job at that generation or a newer one.
-- KEYS[1]     relay    (STRING) token of the last push
-- KEYS[2]     known    (HASH)   id -> generation
-- KEYS[3]     bell     (LIST)   doorbell
-- KEYS[4]     stats    (HASH)   counters
-- KEYS[5..8]  ready    (LIST)   entries of priority 1..4
-- ARGV[1]     token expected, or * to adopt whatever is there
-- ARGV[2]     token to leave
-- ARGV[3]     counter for what is pushed: pushed or repushed
-- ARGV[4..]   entries
-- Returns {-1} when another token is there (Redis lost data, or another relay pushes), else {pushed, length of
-- ready 1..4}. Sent again with the same tokens it changes nothing. Not allow-oom: a full Redis refuses new work.
local token = redis.call('GET', KEYS[1])
if ARGV[1] ~= '*' and token ~= ARGV[1] and token ~= ARGV[2] then
  return {-1}
end
-- What a value of known says; 0 for nothing, and for what no script of ours wrote (a job must not wait behind that).
local function generation_of(value)
  return value and string.match(value, '^[1-9]%d*$') and tonumber(value) <= 2147483647 and tonumber(value) or 0
end
local at_a_time, pushed = 1000, 0 -- what Lua hands to one call has a limit of some 8000
local match = string.match
for first = 4, #ARGV, at_a_time do
  local ids, generations, priorities = {}, {}, {}
  for i = first, math.min(first + at_a_time - 1, #ARGV) do
    local n = i - first + 1
    ids[n], generations[n], priorities[n] = match(ARGV[i], '^(%x+):(%d+):([1-4])')
  end
  local known, newest = redis.call('HMGET', KEYS[2], unpack(ids)), {}
  local lists, fields = {{}, {}, {}, {}}, {}
  for i, id in ipairs(ids) do
    local generation = tonumber(generations[i])
    if (newest[id] or generation_of(known[i])) < generation then
      newest[id] = generation
      local list = lists[tonumber(priorities[i])]
      list[#list + 1] = ARGV[first + i - 1]
      fields[#fields + 1], fields[#fields + 2] = id, generations[i]
    end
  end
  for priority, entries in ipairs(lists) do
    if #entries > 0 then
      redis.call('RPUSH', KEYS[4 + priority], unpack(entries))
      pushed = pushed + #entries
    end
  end
  if #fields > 0 then
    redis.call('HSET', KEYS[2], unpack(fields))
  end
end
redis.call('SET', KEYS[1], ARGV[2])
if pushed > 0 then
  redis.pcall('HINCRBY', KEYS[4], ARGV[3], pushed)
end
local reply, waiting = {pushed}, 0
for i = 5, 8 do
  local length = redis.call('LLEN', KEYS[i])
  reply[i - 3] = length
  waiting = waiting + length
end
if waiting > 0 and redis.call('LPUSH', KEYS[3], 1) > 64 then
  redis.call('LTRIM', KEYS[3], 0, 63)
end
return reply
