"""What Redis does in one step each, in Lua.

A score is two numbers, whole points and millionths (0 to 999999), because a double holds 2^53 points exactly, but not
with six decimal places. A room has
    game     hash: `fixed` (0 or 1), `moves` (how often scores have changed)
    players  hash: id → "joined|whole|millionths|reached|name"
    board    sorted set: the score is the whole points; the member is "millionths:earliness:id" with leading zeros.
             Where scores are equal, Redis compares members as text: more millionths first, then the earlier move.
    request  the digest of what a request of that id asked for, for two minutes
"""

from __future__ import annotations

_COMMON = """
local game, players, board, request = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local LAST = 999999999999999

local function unpacked(text)
    local joined, whole, rest, reached, name = string.match(text, '^(%d+)|(-?%d+)|(%d+)|(%d+)|(.*)$')
    return {joined = tonumber(joined), whole = tonumber(whole), rest = tonumber(rest), reached = tonumber(reached),
            name = name}
end

local function member(id, player)
    return string.format('%06d:%015.0f:%s', player.rest, LAST - player.reached, id)
end

local function keep(id, player)
    local numbers = string.format('%.0f|%.0f|%d|%.0f|', player.joined, player.whole, player.rest, player.reached)
    redis.call('HSET', players, id, numbers .. player.name)  -- not formatted: format stops at a zero character
    redis.call('ZADD', board, string.format('%.0f', player.whole), member(id, player))
end
"""

_REQUEST = """
local what, ttl, channel, room = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if what ~= '' then
    local known = redis.call('GET', request)
    if known then return known == what and 'again' or 'otherwise' end
end
"""

_DONE = """
if what ~= '' then redis.call('SET', request, what, 'EX', ttl) end
redis.call('PUBLISH', channel, room)
return 'done'
"""

START = f"""
{_COMMON} {_REQUEST}
local roster = ARGV[5]
local order = {{}}
if roster ~= '' then
    order = cjson.decode(roster)
else
    local known = {{}}
    local all = redis.call('HGETALL', players)
    for n = 1, #all, 2 do known[#known + 1] = {{all[n], unpacked(all[n + 1])}} end
    table.sort(known, function(a, b) return a[2].joined < b[2].joined end)
    for n, pair in ipairs(known) do order[n] = {{pair[1], pair[2].name}} end
end
redis.call('DEL', players, board)
for n, pair in ipairs(order) do
    keep(pair[1], {{joined = n, whole = 0, rest = 0, reached = n, name = pair[2]}})
end
redis.call('HSET', game, 'fixed', roster ~= '' and 1 or 0, 'moves', #order)
{_DONE}
"""

ADD = f"""
{_COMMON} {_REQUEST}
local id, whole, rest, most = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local fixed = redis.call('HGET', game, 'fixed')
if not fixed then return 'no game' end
local packed = redis.call('HGET', players, id)
if not packed then
    if fixed == '1' then return 'not on roster' end
    if redis.call('HLEN', players) >= most then return 'room full' end
end
local player = packed and unpacked(packed) or {{whole = 0, rest = 0, name = 'Player ' .. id}}
local total_whole, total_rest = player.whole + whole, player.rest + rest
if total_rest >= 1000000 then total_whole, total_rest = total_whole + 1, total_rest - 1000000 end
local MOST = 9007199254740991
if total_whole > MOST or total_whole < -MOST or (total_whole == MOST and total_rest > 0) then return 'out of bounds' end
if not packed or whole ~= 0 or rest ~= 0 then
    local move = redis.call('HINCRBY', game, 'moves', 1)
    if packed then redis.call('ZREM', board, member(id, player)) end
    player.joined = player.joined or move
    player.whole, player.rest, player.reached = total_whole, total_rest, move
    keep(id, player)
end
{_DONE}
"""

BOARD = f"""
{_COMMON}
local limit, around = tonumber(ARGV[1]), ARGV[2]
local first = 0
if around ~= '' then
    local packed = redis.call('HGET', players, around)
    if not packed then return 'nobody' end
    local place = redis.call('ZREVRANK', board, member(around, unpacked(packed)))
    first = math.max(0, math.min(place - math.floor(limit / 2), redis.call('ZCARD', board) - limit))
end

local function score_at(place)
    local entry = redis.call('ZREVRANGE', board, place, place, 'WITHSCORES')
    return entry[2] .. ':' .. string.sub(entry[1], 1, 6)
end

local found = {{{{0, first}}}}
for n, place in ipairs(redis.call('ZREVRANGE', board, first, first + limit - 1)) do
    local id = string.sub(place, 24)
    local player = unpacked(redis.call('HGET', players, id))
    found[n + 1] = {{id, string.format('%.0f', player.whole), player.rest, player.name}}
end
if #found > 1 then  -- the first place that has the score of the first row: equal scores stand together
    local score, low, high = score_at(first), 0, first
    while low < high do
        local middle = math.floor((low + high) / 2)
        if score_at(middle) == score then high = middle else low = middle + 1 end
    end
    found[1][1] = low + 1
end
return found
"""

SAVE_TASKS = """
local data, order, ttl = KEYS[1], KEYS[2], ARGV[1]
for _, record in ipairs(cjson.decode(ARGV[2])) do
    redis.call('HSET', data, record[1], record[2])
    redis.call('ZADD', order, 'NX', redis.call('ZCARD', order), record[1])
end
redis.call('EXPIRE', data, ttl)
redis.call('EXPIRE', order, ttl)
"""
