"""What the shop's tests share: its tables in a database for each test, an HTTP client, and a mailbox."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import aiosmtplib
import httpx
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from shop.database import Session, create_tables, engine
from shop.web import app


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


async def prepare(url: str) -> None:
    await create_tables(create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), poolclass=NullPool))


@pytest.fixture(scope="session")
def jobq_prepare() -> Callable[[str], Awaitable[None]]:
    """The shop's own tables. jobq's are made beside them, once, and each test gets a copy of both."""
    return prepare


@pytest.fixture(autouse=True)
def _database_of_this_test(jobq_engine: AsyncEngine) -> Iterator[None]:
    Session.configure(bind=jobq_engine)
    yield
    Session.configure(bind=engine)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        yield client


@dataclass(frozen=True)
class Mail:
    to: str
    subject: str
    text: str
    message_id: str


@dataclass
class Mailbox:
    """Stands where the jobs expect the way to the mail server: `ctx.state`."""

    mails: list[Mail] = field(default_factory=list)
    refused: frozenset[str] = frozenset()

    async def send(self, to: str, subject: str, text: str, *, message_id: str) -> None:
        if to in self.refused:
            raise aiosmtplib.SMTPRecipientsRefused([aiosmtplib.SMTPRecipientRefused(550, "no such user", to)])
        self.mails.append(Mail(to, subject, text, message_id))


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()
