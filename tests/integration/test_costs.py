"""What a job costs: statements, round trips, Redis commands and WAL, counted. No rate and no time is asserted.

A number that is to rise, rises here first and with its reason; one that has fallen is written down here, and in
docs/costs.md. A "call" is a script that was sent (EVALSHA): one round trip to Redis.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

import jobq
from jobq import Context, JobQ, Reject, Retry, Snooze, embedded
from jobq.broker.client import connect
from jobq.broker.scripts import script
from jobq.relay import relay as relay_module
from jobq.relay import timers as timers_module
from jobq.relay import walk as walk_module
from jobq.relay.janitor import Janitor
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.builders import Bench, running, settled, started, turn, write_effect
from tests.costs import Cost, Meter, Wire, quiet_servers
from tests.enqueuing import Opener, asyncpg_connection, connection_to, engine_for, session, sqlalchemy_connection
from tests.relay_rows import RelayUnderTest, add, delete, open_relay
from tests.shared_database import clean
from tests.waiting import until

SCRIPTS = [path.stem for path in (Path(jobq.__file__).parent / "broker" / "lua").glob("*.lua")]
OPENERS = [session, sqlalchemy_connection, asyncpg_connection]
AWAKE = {"look_ahead": 1e6, "sleep_after": 1_000_000}
"""A relay that neither looks ahead again nor sleeps, beside what open_relay puts off."""
ALWAYS_WALKING = {**AWAKE, "page": 100, "scrub_every": 0.0}


@pytest.fixture(scope="module")
def own_servers() -> Iterator[embedded.Servers]:
    with quiet_servers() as servers:
        yield servers


@pytest.fixture
async def meter(own_servers: embedded.Servers) -> AsyncIterator[Meter]:
    clean(own_servers.database_url)
    async with AsyncExitStack() as stack:
        redis = connect(own_servers.redis_url)
        stack.push_async_callback(redis.aclose)
        await redis.flushdb()
        for name in SCRIPTS:
            await redis.script_load(script(name).source)
        wire, url = await stack.enter_async_context(Wire.before(own_servers.database_url))
        database = await asyncpg.connect(own_servers.database_url)
        stack.push_async_callback(database.close)
        yield Meter(wire, url, own_servers.database_url, own_servers.redis_url, redis, database)


@pytest.fixture
async def bench(meter: Meter) -> AsyncIterator[Bench]:
    async with Bench.open(meter.direct_url, meter.redis_url, database=meter.url) as bench:
        yield bench


def small(app: JobQ, name: str = "small", **options: Any) -> Any:
    """A task that does nothing, with two small arguments."""

    @app.task(name=name, **options)
    async def small(number: int, word: str) -> None:
        pass

    return small


async def cost_of_batch(bench: Bench, meter: Meter, task: Any, count: int) -> Cost:
    """What a worker spends on so many jobs that are ready: the second time, when all statements are prepared."""
    worker = await bench.worker(concurrency=101)  # of a batch that fills all slots the next turn's fetch is part too
    for _ in range(2):
        async with bench.app.database.sessions.begin() as session:
            await bench.app.enqueue_many(session, (task.job(number, "word") for number in range(count)))
        await bench.relay()
        async with meter.reading() as cost:
            await turn(worker)
    return cost


# --- enqueue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", OPENERS)
async def test_an_enqueue_is_one_statement_and_one_round_trip(meter: Meter, opened: Opener) -> None:
    task = small(JobQ())
    async with opened(meter.url) as tx:
        await task.enqueue(tx, 1, "prepares the statement")
        async with meter.reading() as cost:
            await task.enqueue(tx, 2, "word")

    assert (cost.statements, cost.round_trips, cost.commands) == (["enqueue_plain"], 1, {})


async def test_the_first_enqueue_of_a_connection_is_one_round_trip_more(meter: Meter) -> None:
    task = small(JobQ())
    async with asyncpg_connection(meter.url) as tx, meter.reading() as cost:
        await task.enqueue(tx, 1, "word")

    assert (cost.statements, cost.round_trips) == (["enqueue_plain"], 2)


async def test_the_first_enqueue_many_of_a_connection_is_seven_round_trips_more(meter: Meter) -> None:
    app = JobQ()
    task = small(app)
    async with asyncpg_connection(meter.url) as tx, meter.reading() as cost:
        await app.enqueue_many(tx, [task.job(1, "word")])

    # asyncpg asks the catalog what arrays of other types than text are, once a connection.
    assert cost.statements[-1] == "enqueue_alike"
    assert cost.round_trips <= 8


async def test_a_transaction_that_enqueues_is_three_round_trips_its_own_two_among_them(meter: Meter) -> None:
    task = small(JobQ())
    async with engine_for(meter.url) as engine:
        for number in range(2):
            async with meter.reading() as cost, AsyncSession(engine) as session, session.begin():
                await task.enqueue(session, number, "word")

    assert (cost.statements, cost.round_trips) == (["BEGIN", "enqueue_plain", "COMMIT"], 3)


@pytest.mark.parametrize("former_names", [(), ("before", "long_before")])
async def test_an_enqueue_with_an_idempotency_key_is_one_statement(meter: Meter, former_names: tuple[str, ...]) -> None:
    task = small(JobQ(), aliases=former_names)
    async with asyncpg_connection(meter.url) as tx:
        await task.opts(idempotency_key="prepares the statement").enqueue(tx, 1, "word")
        async with meter.reading() as cost:
            await task.opts(idempotency_key="new").enqueue(tx, 2, "word")
            await task.opts(idempotency_key="new").enqueue(tx, 2, "word")

    statement = "enqueue_many_renamed" if former_names else "enqueue_many"
    assert (cost.statements, cost.round_trips) == ([statement] * 2, 2)


@pytest.mark.parametrize(("intents", "statements"), [(100, 1), (10_000, 1), (10_001, 2)])
async def test_ten_thousand_intents_are_one_statement_and_one_round_trip(
    meter: Meter, intents: int, statements: int
) -> None:
    app = JobQ()
    task = small(app)
    async with session(meter.url) as tx:
        await app.enqueue_many(tx, [task.job(0, "prepares the statement")])
        async with meter.reading() as cost:
            await app.enqueue_many(tx, (task.job(number, "word") for number in range(intents)))

    assert (cost.statements, cost.round_trips) == (["enqueue_alike"] * statements, statements)


@pytest.mark.parametrize(
    ("former_names", "statements"),
    [((), ["enqueue_many"]), (("before",), ["lock_keys", "enqueue_many_renamed"])],
    ids=["keys", "keys of a renamed task"],
)
async def test_many_intents_with_keys_are_one_statement_and_one_more_where_a_task_has_former_names(
    meter: Meter, former_names: tuple[str, ...], statements: list[str]
) -> None:
    app = JobQ()
    task = small(app, aliases=former_names)

    def jobs(kind: str) -> Iterator[Any]:
        return (task.opts(idempotency_key=f"{kind} {number}").job(number, "word") for number in range(1_000))

    async with asyncpg_connection(meter.url) as tx:
        await app.enqueue_many(tx, jobs("prepares the statements"))
        async with meter.reading() as cost:
            await app.enqueue_many(tx, jobs("new"))

    assert (cost.statements, cost.round_trips) == (statements, len(statements))


# --- the relay ---------------------------------------------------------------------------------------------------


def relay_of(meter: Meter, **settings: Any) -> AbstractAsyncContextManager[RelayUnderTest]:
    return open_relay(meter.direct_url, meter.redis_url, relay_database_url=meter.url, **settings)


def pushed(calls: int) -> dict[str, int]:
    """What it costs Redis to be pushed entries, up to five hundred a call."""
    entries = {"hmget": 1, "rpush": 1, "hset": 1}  # known? -> reachable -> known
    push = {"evalsha": 1, "get": 1, "set": 1, "llen": 4, "lpush": 1, "hincrby": 1}  # token, lengths, bell, a counter
    return {name: calls * count for name, count in (entries | push).items()}


@pytest.mark.parametrize(("rows", "calls"), [(1, 1), (500, 1), (501, 2), (2_000, 4)])
async def test_a_poll_that_finds_rows_is_one_statement_and_a_call_for_five_hundred(
    meter: Meter, rows: int, calls: int
) -> None:
    async with relay_of(meter, **AWAKE) as relay:
        await relay.settle()
        await add(relay.database, rows)
        async with meter.reading() as cost:
            await relay.turn()

    assert (cost.statements, cost.round_trips) == (["poll"], 1)
    assert cost.commands == pushed(calls)


async def test_a_poll_that_finds_rows_of_many_lists_is_one_statement_and_a_call_for_each_list(meter: Meter) -> None:
    async with relay_of(meter, **AWAKE) as relay:
        for round_ in range(2):  # in the first the queues are met
            async with relay.database.transaction():
                for queue in ("mail", "billing"):
                    for priority in (1, 3):
                        await add(relay.database, 5, queue=queue, priority=priority)
            if round_ == 0:
                await relay.settle()
        async with meter.reading() as cost:
            await relay.turn()

    assert cost.statements == ["poll"]
    assert cost.commands == pushed(calls=4)


async def test_one_job_wakes_a_sleeping_relay_for_eight_statements_and_one_call(meter: Meter) -> None:
    async with relay_of(meter, look_ahead=1e6) as relay:
        for _ in range(3):  # the first finds it at its start, and the second prepares the statements
            await relay.turn_until(lambda: relay.leader._wake_up.is_asleep, "it sleeps")
            await relay.turn()
            await add(relay.database)
            async with meter.reading() as cost:
                await relay.turn()
                await relay.turn_until(lambda: relay.leader._wake_up.is_asleep, "it sleeps again")
                await relay.turn()

    # It pushes before it lets go of the lock; looks four times more, and once again when it has the lock.
    assert cost.statements == ["poll", "unlock", *["poll"] * 4, "try_lock", "poll"]
    assert cost.round_trips == 8
    assert cost.commands == pushed(calls=1)


class Clock:
    """A relay's monotonic clock, which goes on by what the relay says that it would wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1_000.0
        for module in (relay_module, timers_module, walk_module):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now

    async def turns_for(self, relay: RelayUnderTest, seconds: float) -> None:
        ends_at = self.now + seconds
        while self.now < ends_at:
            self.now += await relay.leader.step()


@pytest.mark.parametrize("queues", [1, 3])
async def test_a_minute_of_sleep_costs_a_relay_96_statements_and_62_calls_for_each_queue(
    meter: Meter, monkeypatch: pytest.MonkeyPatch, queues: int
) -> None:
    clock = Clock(monkeypatch)
    as_shipped = {"scrub_every": 5.0, "detect_loss_every": 1.0, "scrub_pause": 0.05, "beat": 2.0}
    async with relay_of(meter, **as_shipped) as relay:
        for queue in ["mail", "billing"][: queues - 1]:
            ids = await add(relay.database, queue=queue)
            await clock.turns_for(relay, 1)
            await delete(relay.database, ids)
            await meter.redis.delete(*relay.broker.keys(queue).ready)
        await clock.turns_for(relay, 60)
        async with meter.reading() as cost:
            await clock.turns_for(relay, 60)

    # A look at the rows each second; every 5 s one at the timers to come, and a pass of the walk.
    assert Counter(cost.statements) == {"poll": 60, "clock": 12, "timers": 12, "page": 12}
    # Of each queue: its token and lengths each second; every 30 s its name, and the types of its keys.
    tokens = {"evalsha": 60, "get": 60, "set": 60, "llen": 240}
    types = {"evalsha": 2, "type": 20}
    of_queue = Counter(tokens) + Counter(types)
    assert cost.commands == {name: queues * count for name, count in of_queue.items()} | {"sadd": 2}


async def test_a_page_of_the_walk_is_one_statement_and_one_command_for_each_list(meter: Meter) -> None:
    async with relay_of(meter, **ALWAYS_WALKING) as relay:
        await add(relay.database, 450)
        await relay.settle()
        await relay.turn_until(lambda: relay.leader._walk._page, "a pass has begun")
        async with meter.reading() as cost:
            await relay.turn()

    assert cost.statements == ["poll", "page"]
    assert cost.commands == {"hmget": 1}


async def test_a_page_of_which_all_is_missing_is_read_again_and_pushed_in_one_call(meter: Meter) -> None:
    async with relay_of(meter, **ALWAYS_WALKING) as relay:
        await add(relay.database, 450)
        await relay.settle()
        for _ in range(2):
            await relay.turn_until(
                lambda: relay.leader._walk._page and len(relay.leader._walk._page.lists["default", 2]) == 100,
                "a pass has begun",
            )
            await meter.redis.delete(relay.broker.keys("default").known)
            async with meter.reading() as cost:
                await relay.turn()

    assert cost.statements == ["poll", "reread", "page"]
    assert cost.commands == Counter(pushed(calls=1)) + Counter({"hmget": 1, "ltrim": cost.commands.get("ltrim", 0)})


# --- the worker --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 100])
async def test_a_batch_is_fetched_read_completed_and_acked_in_one_round_trip_each(
    bench: Bench, meter: Meter, jobs: int
) -> None:
    cost = await cost_of_batch(bench, meter, small(bench.app), jobs)

    # At a concurrency of 100, a hundredth of each for a job.
    assert (cost.statements, cost.round_trips) == (["read", "complete"], 2)
    assert cost.commands["evalsha"] == 2  # fetch and ack


@pytest.mark.parametrize("jobs", [1, 100])
async def test_a_batch_costs_redis_31_commands_from_its_push_to_its_ack_however_many_jobs_it_has(
    bench: Bench, meter: Meter, jobs: int
) -> None:
    task = small(bench.app)
    worker = await bench.worker(concurrency=jobs)
    async with bench.app.database.sessions.begin() as session:
        await bench.app.enqueue_many(session, (task.job(number, "word") for number in range(jobs)))
    async with meter.reading() as cost:
        await bench.relay()
        await turn(worker)

    # Leased? Of priority 1 there are none, of 2 all: known? -> in the working list -> off the ready list. No bell.
    fetch = {
        "evalsha": 1,
        "hexists": 1,
        "lrange": 2,
        "hmget": 1,
        "rpush": 1,
        "ltrim": 1,
        "llen": 4,
        "del": 1,
        "hincrby": 1,
    }
    # Not newer? -> unknown -> off the working list, whose head they are.
    ack = {"evalsha": 1, "hmget": 1, "hdel": 1, "lrange": 1, "ltrim": 1, "hincrby": 1}
    assert cost.commands == sum(map(Counter, (pushed(calls=1), fetch, ack)), Counter())
    assert sum(cost.commands.values()) == 31


async def test_jobs_that_end_out_of_order_cost_redis_one_command_more_each(bench: Bench, meter: Meter) -> None:
    task = small(bench.app)
    for number in range(10):
        await bench.enqueue(task, number, "word")
    await bench.relay()
    await meter.redis.hset(bench.broker.keys("default").beats, "w", 1)
    fetched = await bench.broker.fetch("default", "w", 10)
    assert fetched is not None
    async with meter.reading() as cost:
        await bench.broker.ack("default", "w", fetched.entries[::-1])

    assert cost.commands == {"evalsha": 1, "hmget": 1, "hdel": 1, "lrange": 1, "lrem": 10, "hincrby": 1}


async def test_two_queues_are_fetched_and_acked_in_a_call_each_and_read_and_completed_together(
    bench: Bench, meter: Meter
) -> None:
    mail, billing = (small(bench.app, name, queue=name) for name in ("mail", "billing"))
    worker = await bench.worker(queues=("mail", "billing"), concurrency=101)
    for _ in range(2):
        async with bench.app.database.sessions.begin() as session:
            await bench.app.enqueue_many(session, (task.job(1, "word") for task in [mail, billing] * 50))
        await bench.relay()
        async with meter.reading() as cost:
            await turn(worker)

    assert (cost.statements, cost.round_trips) == (["read", "complete"], 2)
    assert cost.commands["evalsha"] == 4


async def test_a_job_that_completes_in_its_own_transaction_costs_four_round_trips_beside_its_effects(
    bench: Bench, meter: Meter
) -> None:
    @bench.app.task
    async def finish(ctx: Context[Any], number: int, word: str) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    cost = await cost_of_batch(bench, meter, finish, 1)

    assert cost.statements == [
        "read",  # with its batch
        "BEGIN",
        "complete_one",  # the row's DELETE, before any effect, with the worker's name and the bounds
        "INSERT INTO effect (job_id, note) VALUES ($1, $2)",
        "same_transaction",  # or a COMMIT of what the block ended before would say nothing
        "COMMIT",
    ]
    assert cost.round_trips == 6
    assert cost.commands["evalsha"] == 2  # fetch and ack


async def test_jobs_that_complete_in_their_own_transactions_share_the_read_and_the_ack(
    bench: Bench, meter: Meter
) -> None:
    @bench.app.task
    async def finish(ctx: Context[Any], number: int, word: str) -> None:
        async with ctx.complete():
            pass

    worker = await bench.worker(concurrency=10)
    async with bench.app.database.sessions.begin() as session:
        await bench.app.enqueue_many(session, (finish.job(number, "word") for number in range(10)))
    await bench.relay()
    async with meter.reading() as cost:
        await turn(worker)

    counts = Counter(cost.statements)
    assert [counts[name] for name in ("BEGIN", "complete_one", "same_transaction", "COMMIT")] == [10] * 4
    assert counts["read"] == 1
    assert "complete" not in counts
    assert cost.commands["evalsha"] == 2


def failing(app: JobQ, ends: list[Callable[[], Exception] | None]) -> Any:
    """A task whose jobs end so, in turn: None is for done."""

    @app.task
    async def fail(number: int, word: str) -> None:
        if (error := ends[number % len(ends)]) is not None:
            raise error()

    return fail


ENDS: dict[str, tuple[Callable[[], Exception], str]] = {
    "retry": (lambda: Retry(delay=60.0), "reschedule"),
    "failure": (lambda: ValueError("no"), "reschedule"),
    "snooze": (lambda: Snooze(60.0), "reschedule"),
    "reject": (lambda: Reject("no"), "bury"),
}


@pytest.mark.parametrize("jobs", [1, 50])
@pytest.mark.parametrize("end", ENDS)
async def test_jobs_that_end_otherwise_are_settled_in_one_statement_too(
    bench: Bench, meter: Meter, end: str, jobs: int
) -> None:
    error, statement = ENDS[end]
    cost = await cost_of_batch(bench, meter, failing(bench.app, [error]), jobs)

    assert (cost.statements, cost.round_trips) == (["read", statement], 2)
    assert cost.commands["evalsha"] == 2


async def test_a_batch_of_all_ends_costs_a_statement_for_each_way_to_settle(bench: Bench, meter: Meter) -> None:
    task = failing(bench.app, [None, *(error for error, _ in ENDS.values())])
    cost = await cost_of_batch(bench, meter, task, 50)

    assert (cost.statements, cost.round_trips) == (["read", "complete", "reschedule", "bury"], 4)
    assert cost.commands["evalsha"] == 2


async def test_a_burial_with_a_hook_costs_four_statements_beside_the_hooks(bench: Bench, meter: Meter) -> None:
    @bench.app.on_dead
    async def hook(session: Any, dead: Any) -> None:
        pass

    cost = await cost_of_batch(bench, meter, failing(bench.app, [lambda: Reject("no")]), 2)

    one_by_one = ["BEGIN", "bury", "COMMIT", "generations"]  # a hook that fails keeps no other job from its burial
    assert cost.statements == ["read", *one_by_one, *one_by_one]


async def test_a_worker_that_runs_by_itself_costs_few_statements_and_calls_a_job(bench: Bench, meter: Meter) -> None:
    jobs, task = 1_000, small(bench.app)
    worker = Worker(bench.app, WorkerSettings(concurrency=100, beat=3600, lease=36_000))

    async def is_done() -> bool:
        return await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0 and not len(worker.owned)

    async with running(worker):
        await until(lambda: worker.is_open, "it is open")
        for _ in range(2):
            async with bench.app.database.sessions.begin() as session:
                await bench.app.enqueue_many(session, (task.job(number, "word") for number in range(jobs)))
            async with meter.reading() as cost:
                await bench.relay()
                await until(is_done, "all is done")

    # Ten batches, some of them settled together, and what a worker does every few seconds.
    assert len(cost.statements) <= 30, "for 1,000 jobs; it was 20"
    assert cost.commands["evalsha"] <= 30, "for 1,000 jobs; it was 21"


# --- a worker that is idle ---------------------------------------------------------------------------------------


async def test_an_idle_turn_is_a_fetch_and_another_behind_a_wait_for_the_bell_and_asks_postgresql_nothing(
    bench: Bench, meter: Meter
) -> None:
    small(bench.app)
    worker = await bench.worker()
    worker.orders.woken.clear()

    async def is_waiting() -> bool:
        return (await meter.redis.info("clients"))["blocked_clients"] == 1

    async with meter.reading() as cost:
        idle = asyncio.create_task(worker.turns.step())
        await until(is_waiting, "it waits for the bell")
        await meter.redis.lpush(bench.broker.keys("default").bell, "1")
        await idle

    assert (cost.statements, cost.round_trips) == ([], 0)
    fetches = {"evalsha": 2, "hexists": 2, "lrange": 8, "llen": 8, "del": 2}
    assert cost.commands == fetches | {"blpop": 1} | {"lpush": 1}  # the last one is this test's


async def test_a_beat_is_one_call_with_a_command_for_each_job_that_is_owned(bench: Bench, meter: Meter) -> None:
    task = small(bench.app)
    worker = await bench.worker(concurrency=20)
    for number in range(10):
        await bench.enqueue(task, number, "word")
    await bench.relay()
    await started(worker)
    async with meter.reading() as cost:
        await asyncio.to_thread(worker.heartbeat.step)
    await settled(worker)

    assert cost.commands == {"evalsha": 1, "hexists": 2, "hset": 1, "lrange": 1, "hget": 10}


async def test_a_look_at_other_workers_is_three_commands_and_asks_postgresql_nothing(
    bench: Bench, meter: Meter
) -> None:
    small(bench.app)
    worker = await bench.worker()
    async with meter.reading() as cost:
        await worker.sweeper.step()

    assert (cost.statements, cost.round_trips) == ([], 0)
    assert cost.commands == {"sscan": 1, "hgetall": 1, "hkeys": 1}


async def test_a_look_at_postgresql_is_one_statement(bench: Bench, meter: Meter) -> None:
    worker = await bench.worker()
    await worker.turns.look()
    async with meter.reading() as cost:
        await worker.turns.look()

    assert (cost.statements, cost.round_trips, cost.commands) == (["read"], 1, {})


async def test_a_look_for_parked_jobs_is_one_call_with_a_command_for_each_task(bench: Bench, meter: Meter) -> None:
    for name in ("a", "b", "c"):
        small(bench.app, name)
    worker = await bench.worker()
    async with meter.reading() as cost:
        await worker._unpark()

    assert (cost.statements, cost.commands) == ([], {"evalsha": 1, "hexists": 1, "lindex": 3})


async def test_a_tidy_up_costs_nine_statements_the_connection_that_it_opens_among_them(
    bench: Bench, meter: Meter
) -> None:
    janitor = Janitor(bench.app.database, bench.app.schema, RelaySettings(tidy_every=1e-9))
    await janitor.step()
    async with meter.reading() as cost:
        await janitor.step()

    assert cost.statements[-6:] == ["BEGIN", "begin_tidy", "tidy_keys", "tidy_steps", "tidy_dead", "COMMIT"]
    assert len(cost.statements) <= 9, "its settings, and two looks at where it leads"
    assert cost.commands == {}


# --- WAL and dead rows -------------------------------------------------------------------------------------------

LIFE_BYTES = 480
"""It was 411, and 28 for VACUUM; another index would add 64 and more. The promise is 700."""
ENQUEUE_BYTES = 370
"""It was 334, COMMIT and all."""


async def test_a_small_job_writes_little_wal_in_its_whole_life_and_leaves_one_dead_row(meter: Meter) -> None:
    jobs = 10_000
    before = await changed_rows(meter)
    async with Bench.open(meter.direct_url, meter.redis_url) as bench:
        task = small(bench.app)
        worker = await bench.worker(concurrency=500)
        async with meter.reading() as cost:
            for _ in range(jobs // 1_000):
                async with bench.app.database.sessions.begin() as session:
                    await bench.app.enqueue_many(session, (task.job(number, "word") for number in range(1_000)))
            await bench.relay()
            while await bench.ready() or len(worker.owned):
                await turn(worker)
            await meter.database.execute("VACUUM (INDEX_CLEANUP ON) jobq.outbox")
        await bench.assert_drained()

    assert cost.wal_bytes <= jobs * LIFE_BYTES
    assert await changed_rows(meter) - before == Counter(inserted=jobs, deleted=jobs), "and none updated"


async def test_an_enqueue_in_a_transaction_of_its_own_writes_little_wal(meter: Meter) -> None:
    jobs, task = 200, small(JobQ())
    async with connection_to(meter.direct_url) as connection, meter.reading() as cost:
        for number in range(jobs):
            async with connection.transaction():
                await task.enqueue(connection, number, "word")

    assert cost.wal_bytes <= jobs * ENQUEUE_BYTES


async def changed_rows(meter: Meter) -> Counter[str]:
    """Rows of the outbox that were inserted, updated and deleted so far, be it committed or not."""

    async def is_alone() -> bool:  # a session has told its counts when it is gone
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        return bool(await meter.database.fetchval(others) == 0)

    await until(is_alone, "everybody has gone")
    counts = "n_tup_ins AS inserted, n_tup_upd AS updated, n_tup_del AS deleted"
    of_outbox = "schemaname = 'jobq' AND relname = 'outbox'"
    return Counter(dict(await meter.database.fetchrow(f"SELECT {counts} FROM pg_stat_user_tables WHERE {of_outbox}")))
