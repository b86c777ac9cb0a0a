"""Timers: every delayed job is pushed, on time and not before, whenever it was committed."""

from __future__ import annotations

import asyncio
from itertools import combinations_with_replacement

import asyncpg
import pytest

from tests.relay_rows import RelayUnderTest, add, entries, open_relay, own_connection

AHEAD_S = 0.1


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    """These tests leave jobq's tables as they are, and share a database."""
    return shared_database_url


async def test_a_delayed_job_is_pushed_when_it_is_due_and_not_before(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await relay.settle()
        ids = await add(relay.database, delay_s=0.15)
        await relay.turn_until(relay.ready, "the job is pushed")
        assert await relay.database.fetchval("SELECT bool_and(run_at <= clock_timestamp()) FROM jobq.outbox")
        assert await relay.ready() == entries(ids)


async def test_a_turn_ends_in_time_for_the_next_timer(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, poll_shortest=5.0, poll_longest=5.0) as relay:
        await relay.settle()
        await add(relay.database, delay_s=2)
        await relay.leader.step()
        assert 0 < await relay.leader.step() < 2


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.06, AHEAD_S, 0.13, 0.25])
async def test_a_delay_around_the_look_ahead_is_pushed_whenever_it_was_written_and_committed(
    database_url: str, redis_url: str, delay_s: float
) -> None:
    """Rows are inserted at every moment of three turns, and committed at every later one."""
    moments = [(turn, step) for turn in range(3) for step in range(3)]
    async with open_relay(database_url, redis_url, look_ahead=AHEAD_S) as relay:
        await relay.settle()
        open_rows = [OpenRow(relay, at, until) for at, until in combinations_with_replacement(moments, 2)]
        for moment in moments:
            for row in open_rows:
                await row.pass_by(moment, database_url, delay_s)
            await one_part_of_a_turn(relay, moment[1])
            if moment[1] == 2:
                # Time goes on, so that each turn looks ahead anew.
                relay.leader._timers._next_look = 0.0
        for row in open_rows:
            await row.close()
        wanted = sorted(entry for row in open_rows for entry in row.entries)

        await relay.turn_until(lambda: has_all(relay, wanted), "every row is pushed")
        assert sorted(await relay.ready()) == wanted


async def one_part_of_a_turn(relay: RelayUnderTest, step: int) -> None:
    match step:
        case 0:
            await relay.leader._timers.look_ahead()
        case 1:
            await relay.leader._poll()
        case 2:
            await relay.leader._push_due()


async def has_all(relay: RelayUnderTest, wanted: list[str]) -> bool:
    return set(wanted) <= set(await relay.ready())


class OpenRow:
    """A row whose transaction begins at one moment and commits at another."""

    def __init__(self, relay: RelayUnderTest, begins: tuple[int, int], commits: tuple[int, int]):
        self.begins, self.commits = begins, commits
        self.entries: list[str] = []
        self._connection: asyncpg.Connection | None = None

    async def pass_by(self, moment: tuple[int, int], url: str, delay_s: float) -> None:
        if moment == self.begins:
            self._connection = await asyncpg.connect(url)
            await self._connection.execute("BEGIN")
            self.entries = entries(await add(self._connection, delay_s=delay_s))
        if moment == self.commits:
            assert self._connection is not None
            await self._connection.execute("COMMIT")

    async def close(self) -> None:
        assert self._connection is not None
        await self._connection.close()


async def test_no_delay_is_lost_while_rows_are_committed_all_the_time(database_url: str, redis_url: str) -> None:
    """The horizon moves every few milliseconds, and rows are due on both sides of it."""
    written: list[str] = []

    async def write(number: int) -> None:
        async with own_connection(database_url) as connection:
            for turn in range(60):
                async with connection.transaction():
                    ids = await add(connection, delay_s=(turn * 7 + number * 3) % 40 / 1000)
                    await connection.execute(f"SELECT pg_sleep({turn % 4 / 1000})")
                written.extend(entries(ids))

    async with open_relay(database_url, redis_url, look_ahead=0.01) as relay:
        await relay.settle()
        writers = [asyncio.ensure_future(write(number)) for number in range(6)]
        while not all(writer.done() for writer in writers):
            await relay.turn()
        await asyncio.gather(*writers)
        await relay.turn_until(lambda: has_all(relay, written), "every row is pushed")
        assert sorted(await relay.ready()) == sorted(written)


async def test_more_timers_than_one_look_reads_are_all_pushed(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        wanted = [entry for n in range(35) for entry in entries(await add(connection, delay_s=0.05 + n / 200))]
        async with open_relay(database_url, redis_url, poll_limit=10) as relay:
            await relay.turn_until(lambda: has_all(relay, wanted), "every row is pushed")
            assert sorted(await relay.ready()) == wanted


async def test_more_timers_of_one_moment_than_one_look_reads_are_all_pushed(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        wanted = entries(await add_at_one_moment(connection, 35))
        async with open_relay(database_url, redis_url, poll_limit=10) as relay:
            await relay.turn_until(lambda: has_all(relay, wanted), "every row is pushed")
            assert sorted(await relay.ready()) == wanted


async def add_at_one_moment(connection: asyncpg.Connection, count: int) -> list[object]:
    async with connection.transaction():
        ids = await add(connection, count, delay_s=0.2)
        await connection.execute("UPDATE jobq.outbox SET run_at = (SELECT max(run_at) FROM jobq.outbox)")
    return ids  # type: ignore[return-value]


@pytest.mark.parametrize("delay_s", [0.0, 0.2])
async def test_more_delayed_rows_in_one_transaction_than_a_poll_hands_over_are_all_pushed(
    database_url: str, redis_url: str, delay_s: float
) -> None:
    async with open_relay(database_url, redis_url, poll_limit=10) as relay:
        await relay.settle()
        wanted = entries(await add(relay.database, 35, delay_s=delay_s))
        await relay.turn_until(lambda: has_all(relay, wanted), "every row is pushed")
        assert sorted(await relay.ready()) == wanted
