"""Builders for tests of enqueue: transactions as applications open them, and what the outbox then holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeAlias

import asyncpg
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

Opener: TypeAlias = Callable[[str], AbstractAsyncContextManager[Any]]


@asynccontextmanager
async def engine_for(url: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine as an application makes one."""
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), **options)
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def connection_to(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def emptied(url: str) -> AsyncIterator[str]:
    """A database for one test of many: faster than one each, since enqueue changes nothing but rows."""
    yield url
    await fetch(url, "DROP SCHEMA IF EXISTS other_jobs CASCADE")
    await fetch(url, "DROP TABLE IF EXISTS orders")
    await fetch(url, "TRUNCATE jobq.outbox, jobq.idempotency_key, jobq.dead")


# Each opens a transaction that is committed at the end of the block, or rolled back by an exception.


@asynccontextmanager
async def session(url: str) -> AsyncIterator[AsyncSession]:
    async with engine_for(url) as engine, AsyncSession(engine) as session, session.begin():
        yield session


@asynccontextmanager
async def session_of_maker(url: str) -> AsyncIterator[AsyncSession]:
    async with engine_for(url) as engine, async_sessionmaker(engine, expire_on_commit=False).begin() as session:
        yield session


@asynccontextmanager
async def scoped_session(url: str) -> AsyncIterator[async_scoped_session[AsyncSession]]:
    async with engine_for(url) as engine:
        session = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        try:
            yield session
            await session.commit()
        finally:
            await session.remove()


@asynccontextmanager
async def sqlalchemy_connection(url: str) -> AsyncIterator[AsyncConnection]:
    async with engine_for(url) as engine, engine.begin() as connection:
        yield connection


@asynccontextmanager
async def session_on_connection(url: str) -> AsyncIterator[AsyncSession]:
    async with sqlalchemy_connection(url) as connection, AsyncSession(connection) as session:
        yield session
        await session.commit()


@asynccontextmanager
async def asyncpg_connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    async with connection_to(url) as connection, connection.transaction():
        yield connection


@asynccontextmanager
async def asyncpg_pool_proxy(url: str) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool, pool.acquire() as proxy, proxy.transaction():
        yield proxy


OPENERS: list[Opener] = [
    session,
    session_of_maker,
    scoped_session,
    sqlalchemy_connection,
    session_on_connection,
    asyncpg_connection,
    asyncpg_pool_proxy,
]


class Away(Exception):
    """What an application raises to roll its transaction back."""


@asynccontextmanager
async def rolled_back(block: AbstractAsyncContextManager[Any]) -> AsyncIterator[Any]:
    """Leave a transaction, or a savepoint, by an exception."""
    with suppress(Away):
        async with block as tx:
            yield tx
            raise Away


async def execute(tx: Any, statement: str) -> None:
    """Run a statement of the application's own in its transaction."""
    await tx.execute(statement if hasattr(tx, "is_in_transaction") else text(statement))


def savepoint(tx: Any) -> AbstractAsyncContextManager[Any]:
    return tx.transaction() if hasattr(tx, "is_in_transaction") else tx.begin_nested()


async def fetch(url: str, query: str, *args: object) -> list[asyncpg.Record]:
    """What another connection sees."""
    async with connection_to(url) as connection:
        return await connection.fetch(query, *args)


async def outbox(url: str) -> list[asyncpg.Record]:
    """The committed rows, in the order of their ids."""
    return await fetch(url, "SELECT * FROM jobq.outbox ORDER BY id")
