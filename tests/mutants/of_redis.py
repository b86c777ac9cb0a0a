"""Mutations of the scripts and of the connection to Redis."""

from __future__ import annotations

from tests.mutants.mutation import Edit, Mutation

_LUA = "jobq/broker/lua"

OF_REDIS = (
    Mutation(
        name="client-retries",
        breaks="The client sends a write again behind jobq's back.",
        edits=(
            Edit(
                "jobq/broker/client.py",
                "_options(AsyncRetry(NoBackoff(), 0), None)",
                "_options(AsyncRetry(NoBackoff(), 3), None)",
            ),
        ),
        tests=("tests/integration/test_client.py::test_a_write_without_a_reply_is_sent_once",),
    ),
    Mutation(
        name="push-without-token",
        breaks="A push goes through whatever token it finds.",
        edits=(
            Edit(
                f"{_LUA}/push.lua",
                "if ARGV[1] ~= '*' and token ~= ARGV[1] and token ~= ARGV[2] then\n",
                "if false then\n",
            ),
        ),
        tests=(
            "tests/integration/test_push.py::test_of_two_relays_the_one_that_pushed_before_is_refused",
            "tests/integration/test_relay.py::test_flushall_is_found_by_a_touch_and_everything_pushed_again",
            "tests/integration/test_relay.py::test_a_redis_that_went_back_in_time_is_found_by_its_token",
        ),
    ),
    Mutation(
        name="known-before-list",
        breaks="A push writes what Redis knows before the entry is in a list.",
        edits=(
            Edit(
                f"{_LUA}/push.lua",
                "  for priority, entries in ipairs(lists) do\n",
                "  redis.call('HSET', KEYS[2], unpack(fields))\n  for priority, entries in ipairs(lists) do\n",
            ),
        ),
        tests=("tests/integration/test_script_order.py",),
    ),
    Mutation(
        name="list-before-known",
        breaks="An ack takes the entry out of its list before Redis forgets the job.",
        edits=(
            Edit(
                f"{_LUA}/ack.lua",
                "for first = 2, #ARGV, at_a_time do\n",
                "for i = 2, #ARGV do\n  redis.call('LREM', KEYS[3], 1, ARGV[i])\nend\n"
                "for first = 2, #ARGV, at_a_time do\n",
            ),
        ),
        tests=("tests/integration/test_script_order.py",),
    ),
    Mutation(
        name="ack-any-generation",
        breaks="A late ack makes Redis forget a newer generation.",
        edits=(
            Edit(
                f"{_LUA}/ack.lua",
                "      if value == generations[i] or generation_of(value) <= tonumber(generations[i]) then\n",
                "      if true then\n",
            ),
        ),
        tests=("tests/integration/test_scripts.py::test_ack_of_an_old_generation_keeps_the_newer_known",),
    ),
    Mutation(
        name="ack-leaves-entry",
        breaks="An ack leaves the entry in the working list.",
        edits=(Edit(f"{_LUA}/ack.lua", "  redis.call('LTRIM', KEYS[3], same, -1)\n", ""),),
        tests=("tests/integration/test_scripts.py::test_ack_forgets_settled_entries",),
    ),
    Mutation(
        name="fetch-stale",
        breaks="A fetch hands out entries of generations that are over.",
        edits=(
            Edit(
                f"{_LUA}/fetch.lua",
                "      if generations[i] and known[i] == generations[i] then\n",
                "      if generations[i] then\n",
            ),
        ),
        tests=(
            "tests/integration/test_scripts.py::test_fetch_drops_entries_that_are_not_at_the_generation_redis_knows",
        ),
    ),
    Mutation(
        name="fetch-without-lease",
        breaks="A worker fetches that Redis does not know.",
        edits=(
            Edit(
                f"{_LUA}/fetch.lua",
                "if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then\n",
                "if false then\n",
            ),
        ),
        tests=("tests/integration/test_scripts.py::test_fetch_by_a_worker_without_a_heartbeat_is_fenced",),
    ),
    Mutation(
        name="full-redis-does-not-drain",
        breaks="A Redis without memory refuses acks.",
        edits=(Edit(f"{_LUA}/ack.lua", "#!lua flags=allow-oom\n", "#!lua\n"),),
        tests=("tests/integration/test_script_memory.py",),
    ),
    Mutation(
        name="sweep-of-the-living",
        breaks="A worker is swept whose counter has moved.",
        edits=(
            Edit(
                f"{_LUA}/sweep.lua",
                "if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= ARGV[2] then\n",
                "if false then\n",
            ),
        ),
        tests=(
            "tests/integration/test_scripts.py::test_sweep_of_a_worker_whose_counter_moved_changes_nothing",
            "tests/integration/test_sweeper.py::test_a_worker_that_beats_again_during_the_sweep_keeps_its_list",
        ),
    ),
)
