"""What the README says is run here: its code is type-checked, its roles and its Redis user suffice."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
import redis
from sqlalchemy import text
from sqlalchemy.engine import make_url

from jobq import Context, JobQ, RetryPolicy
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.waiting import until

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

_NAMES_OF_THE_APPLICATION = """
from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
import httpx
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    paid: Mapped[bool]


@dataclass(frozen=True)
class State:
    http: httpx.AsyncClient


@asynccontextmanager
async def lifespan() -> AsyncIterator[State]:
    async with httpx.AsyncClient() as http:
        yield State(http)


MAIL_URL = "http://mail.example/"
Session = async_sessionmaker(create_async_engine("postgresql+asyncpg://localhost/shop"))
order_ids = [1, 2, 3]
"""


def _blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [block for found, block in fenced if found == language]


def _program() -> str:
    """The README's Python blocks as one module: top-level `async with` goes into a function."""
    first, enqueue, run = _blocks("python")
    inside = "".join(f"    {line}\n" if line else "\n" for line in enqueue.splitlines())
    usage = f"async def use(order: Order, pool: asyncpg.Pool) -> None:\n{inside}"
    return "\n\n".join([_NAMES_OF_THE_APPLICATION, first, usage, run])


@pytest.mark.parametrize(
    "checker", [["mypy", "--strict"], ["pyright", "--pythonpath", sys.executable]], ids=["mypy", "pyright"]
)
def test_the_code_of_the_readme_passes_strict_type_checkers(checker: list[str], tmp_path: Path) -> None:
    program = tmp_path / "shop.py"
    program.write_text(_program())

    checked = subprocess.run([sys.executable, "-m", *checker, str(program)], capture_output=True, text=True, cwd=ROOT)

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_row_of_the_crash_table_has_a_test_and_the_file_is_where_the_readme_says() -> None:
    named = re.search(r"`(tests/faults/test_crash_table\.py)`", README)
    assert named is not None
    tests = (ROOT / named[1]).read_text(encoding="utf-8")
    rows = README[README.index("| something breaks |") :].split("\n\n")[0].splitlines()[2:]

    assert len(re.findall(r"^async def test_", tests, re.MULTILINE)) >= len(rows)


async def test_the_roles_of_the_readme_suffice_for_web_relay_and_workers(
    database_url: str, redis_url: str, sql_roles: dict[str, str], redis_user: str
) -> None:
    web = JobQ(database=sql_roles["shop_web"])
    app = JobQ(database=sql_roles["shop_worker"], redis=redis_user)
    done: list[int] = []

    async def work(ctx: Context, number: int) -> None:
        if number == 2:
            raise ValueError("dead at once")
        if number == 3:
            async with ctx.complete():
                pass
        done.append(number)

    task = web.task(name="work", retry=RetryPolicy(max_attempts=1))(work)
    app.task(name="work", retry=RetryPolicy(max_attempts=1))(work)
    async with web.database.sessions.begin() as session:
        await task.enqueue(session, 1)
        await task.opts(idempotency_key="two").enqueue(session, 2)
        await task.opts(delay=0.01).enqueue(session, 3)
        await web.enqueue_many(session, [task.job(4), task.job(5)])

    async with _processes(app, sql_roles["shop_relay"], redis_user):
        await until(lambda: sorted(done) == [1, 3, 4, 5], "the jobs of the least-privileged ran")
        await until(lambda: _dead(database_url, 1), "the failed job is dead")
    await web.database.close()
    await app.database.close()


@pytest.fixture
async def sql_roles(database_url: str) -> AsyncIterator[dict[str, str]]:
    """The README's roles, in this test's database; each name with its URL."""
    roles = ("shop_web", "shop_worker", "shop_relay")
    owner = await asyncpg.connect(database_url)
    for role in roles:
        await owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    (grants,) = _blocks("sql")
    await owner.execute(grants)
    url = make_url(database_url)
    yield {role: url.set(username=role, password="secret").render_as_string(hide_password=False) for role in roles}
    for role in roles:
        await owner.execute(f"DROP OWNED BY {role}")
        await owner.execute(f"DROP ROLE {role}")
    await owner.close()


@pytest.fixture
def redis_user(redis_url: str) -> Iterator[str]:
    """The README's Redis user; yields its URL."""
    line = next(block for block in _blocks("") if "ACL SETUSER" in block)
    with redis.Redis.from_url(redis_url) as client:
        client.execute_command(*line.split())
        yield redis_url.replace("unix://", "unix://jobq:password@").replace("redis://", "redis://jobq:password@")
        client.acl_deluser("jobq")


@asynccontextmanager
async def _processes(app: JobQ, relay_database: str, relay_redis: str) -> AsyncIterator[None]:
    """A relay and a worker in this process, each with its own database role."""
    relaying = JobQ(database=relay_database, redis=relay_redis)
    stopping = asyncio.Event()
    worker = Worker(app, WorkerSettings(grace=1, beat=0.2))
    relay = Relay(relaying.database, relay_redis, "jobq", RelaySettings(tidy_every=0.05))
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.run(stopping))
        group.create_task(worker.run())
        try:
            yield
        finally:
            stopping.set()
            worker.orders.stopping.set()
            worker.orders.wake()
    await relaying.database.close()


async def _dead(database_url: str, count: int) -> bool:
    owner = JobQ(database=database_url)
    async with owner.database.sessions() as session:
        found = (await session.execute(text("SELECT count(*) FROM jobq.dead"))).scalar_one()
    await owner.database.close()
    return int(found) == count
