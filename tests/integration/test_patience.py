"""The deadline for what jobq itself asks on the application's connections; what the application asks has none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Text, cast, func, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from jobq import Context
from jobq.outbox import patience as patience_module
from jobq.outbox.patience import Patience
from tests.builders import Bench, turn
from tests.integration.test_context import own_engine

ANSWER_S = 2.0


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "ANSWER_TIMEOUT_S", ANSWER_S)


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


async def test_what_a_session_writes_only_at_its_commit_may_take_its_time(bench: Bench) -> None:
    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            session.add(Effect(note=cast(func.pg_sleep(ANSWER_S + 1), Text)))

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await turn(worker)

    assert await bench.row(job_id) is None
    assert await bench.effects() == 1


async def test_a_connection_given_back_is_not_ended_while_the_next_one_is_waited_for(shared_database_url: str) -> None:
    engine = own_engine(shared_database_url, pool_size=1, max_overflow=0)
    with Patience() as patience:
        async with engine.connect() as given_back:
            await patience.begin(given_back)
        async with engine.connect() as others, AsyncSession(engine) as session:
            waiting = asyncio.create_task(patience.begin(session))
            await others.execute(text("SELECT pg_sleep(:s)"), {"s": ANSWER_S + 1})
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    await engine.dispose()
