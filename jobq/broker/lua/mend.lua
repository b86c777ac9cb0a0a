#!lua flags=allow-oom
-- Remove keys that have another type than jobq gives them: somebody wrote into our name space. What Redis knows
-- and the relay's token go too, so that the relay takes it for a loss and rebuilds the queue from PostgreSQL.
-- KEYS[1]   relay  (STRING)
-- KEYS[2]   known  (HASH)
-- KEYS[3]   stats  (HASH)
-- KEYS[4..] keys to look at
-- ARGV[1..] the type that KEYS[1..] must have: string, hash or list
-- Returns the number removed for their type.
local removed = 0
for i = 1, #KEYS do
  local kind = redis.call('TYPE', KEYS[i])['ok']
  if kind ~= 'none' and kind ~= ARGV[i] then
    redis.call('DEL', KEYS[i])
    removed = removed + 1
  end
end
if removed > 0 then
  redis.call('DEL', KEYS[2])
  redis.call('DEL', KEYS[1])
  redis.pcall('HINCRBY', KEYS[3], 'mended', removed)
end
return removed
