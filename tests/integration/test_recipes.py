"""The pages about other ways in are run as a reader would: their files written, their commands typed."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from sqlalchemy.engine import make_url

from jobq import Context, JobQ
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.commands import Commands, started
from tests.enqueuing import connection_to, fetch
from tests.integration.test_chain import Chain, chain, empty
from tests.markdown import blocks, files, write_files
from tests.waiting import until

__all__ = ["chain", "empty"]

DOCS = Path(__file__).parents[2] / "docs"
WEB_PAGES = ["fastapi", "litestar"]


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let the modules of a folder be imported, and forget them afterwards."""
    # The shop of examples/, whose tests may have run in this process, would be found first: it has an __init__.py.
    path, others = sys.path[:], forget_shops()
    sys.path[:] = [str(folder), *(entry for entry in path if not Path(entry, "shop").is_dir())]
    try:
        yield
    finally:
        sys.path[:] = path
        forget_shops()
        sys.modules.update(others)


def forget_shops() -> dict[str, ModuleType]:
    """Make `import shop` look for it again; returns the modules that were there."""
    names = [name for name in sys.modules if name.partition(".")[0] == "shop"]
    return {name: sys.modules.pop(name) for name in names}


@asynccontextmanager
async def processes(app: JobQ, redis_url: str) -> AsyncIterator[None]:
    """What `jobq run` runs, in this process."""
    app.connect_to(redis=redis_url)
    stopping = asyncio.Event()
    relay = Relay(app.database, redis_url, app.schema, RelaySettings())
    worker = Worker(app, WorkerSettings(queues=("mail",), grace=1, beat=0.2))
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.run(stopping))
        group.create_task(worker.run())
        try:
            yield
        finally:
            stopping.set()
            worker.orders.stopping.set()
            worker.orders.wake()


# FastAPI and Litestar


@pytest.fixture(params=WEB_PAGES)
async def web(
    request: pytest.FixtureRequest, shared_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """The shop of a page, its lifespan entered: (modules, client)."""
    monkeypatch.setenv("JOBQ_DATABASE_URL", shared_database_url)
    assert {path.name for path in write_files(DOCS / f"{request.param}.md", tmp_path)} == {
        "database.py",
        "jobs.py",
        "web.py",
    }
    if request.param == "litestar":  # it would configure the root logger, and start a thread that writes
        monkeypatch.setattr("litestar.logging.config.LoggingConfig.configure", lambda _: logging.getLogger)
    with importable(tmp_path):
        shop, app = import_module("shop.jobs"), import_module("shop.web").app
        lifespan = app.lifespan() if request.param == "litestar" else app.router.lifespan_context(app)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with lifespan, httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            yield shop.jobs, client


async def test_a_request_leaves_an_order_and_a_job_that_runs(web, shared_database_url, redis_url, capsys):
    jobs, client = web

    response = await client.post("/orders", json={"email": "ada@example.com", "cups": 2})

    assert response.status_code == 201
    [row] = await fetch(shared_database_url, "SELECT id, queue FROM jobq.outbox")
    assert response.json() == {"order": "1", "job": str(row["id"])}
    async with processes(jobs, redis_url):
        await until(partial(done, shared_database_url), "the job ran")
    assert capsys.readouterr().out == "To ada@example.com: 2 cups are on their way\n"


async def test_a_request_that_fails_after_it_enqueued_leaves_neither(web, shared_database_url):
    _, client = web

    response = await client.post("/orders", json={"email": "ada@example.com", "cups": 101})

    assert response.status_code == 409
    assert await fetch(shared_database_url, "SELECT FROM orders UNION ALL SELECT FROM jobq.outbox") == []


async def test_a_commit_that_fails_is_an_error_for_the_client(web, shared_database_url):
    _, client = web
    await fetch(shared_database_url, "ALTER TABLE orders ADD UNIQUE (email) DEFERRABLE INITIALLY DEFERRED")
    await client.post("/orders", json={"email": "ada@example.com"})

    response = await client.post("/orders", json={"email": "ada@example.com"})

    assert response.status_code == 500
    assert len(await fetch(shared_database_url, "SELECT FROM jobq.outbox")) == 1


async def done(url: str) -> bool:
    return await fetch(url, "SELECT FROM jobq.outbox") == []


@pytest.mark.parametrize("page", WEB_PAGES)
async def test_the_commands_of_a_page_make_the_tables(page, database_url, redis_url, tmp_path, monkeypatch):
    write_files(DOCS / f"{page}.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    await fetch(database_url, "DROP SCHEMA jobq CASCADE")
    lines = commands(page)
    assert "jobq dev shop.jobs:jobs" in lines
    assert "jobq run &" in lines
    assert "uvicorn shop.web:app &" in lines

    with importable(tmp_path):
        monkeypatch.setenv("JOBQ_DATABASE_URL", database_url)
        migrate = first(lines, "jobq migrate")
        result = await Commands(database_url, redis_url).run(*migrate, JOBQ_APP=named(page)["JOBQ_APP"])

    assert result.exit_code == 0, result.output
    assert await done(database_url)


def commands(page: str) -> list[str]:
    return [line for block in blocks(DOCS / f"{page}.md", "sh") for line in block.text.splitlines()]


def first(lines: list[str], program: str) -> list[str]:
    """The arguments of its first call."""
    return next(line.split()[1:] for line in lines if line.startswith(f"{program} "))


def named(page: str) -> dict[str, str]:
    """What the page exports."""
    return dict(re.findall(r"(\w+)=(\S+)", "\n".join(line for line in commands(page) if line.startswith("export "))))


# Django


DRIVE = """
import django, json
django.setup()
from django.core.management import call_command
from django.test import Client
from django.db import connection

call_command("makemigrations", "shop", verbosity=0)
call_command("migrate", verbosity=0)
client = Client(SERVER_NAME="localhost", raise_request_exception=False)
kept = client.post("/orders", {"email": "ada@example.com", "cups": "2"})
refused = client.post("/orders", {"email": "bob@example.com", "cups": "101"})
with connection.cursor() as cursor:
    cursor.execute("SELECT email FROM shop_order")
    print(json.dumps([kept.status_code, kept.json(), refused.status_code, cursor.fetchall()]))
"""


async def test_a_django_view_leaves_an_order_and_a_job_that_runs_with_the_orm(shared_database_url, redis_url, tmp_path):
    write_files(DOCS / "django.md", tmp_path)
    parts = make_url(shared_database_url)
    env = {
        **named("django"),
        "JOBQ_DATABASE_URL": shared_database_url,
        "JOBQ_REDIS_URL": redis_url,
        "PGHOST": str(parts.host or parts.query["host"]),
        "PGUSER": parts.username or "",
        "PGPASSWORD": parts.password or "",
        "PGPORT": str(parts.port or ""),
        "PGDATABASE": parts.database or "",
    }

    driven = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-c", DRIVE],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )

    assert driven.returncode == 0, driven.stderr
    [row] = await fetch(shared_database_url, "SELECT id FROM jobq.outbox")
    expected = [201, {"order": 1, "job": str(row["id"])}, 500, [["ada@example.com"]]]
    assert driven.stdout.strip() == str(expected).replace("'", '"')
    with started("run", folder=tmp_path, **env) as process:
        await process.says("To ada@example.com: 2 cups are on their way")
        await until(partial(done, shared_database_url), "the job is done")
        await until(partial(no_connection_without_a_name, shared_database_url), "the ORM's connection is closed")


async def no_connection_without_a_name(url: str) -> bool:
    """jobq's own have one."""
    others = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return await fetch(url, f"{others} AND backend_type = 'client backend' AND application_name = ''") == []


def test_the_page_about_django_names_every_file_it_needs():
    assert set(files(DOCS / "django.md")) == {
        *("mysite/settings.py", "mysite/urls.py", "shop/models.py", "shop/jobs.py", "shop/views.py", "shop/worker.py"),
    }


# alembic


def test_the_page_about_alembic_says_what_the_commands_do(chain: Chain):
    call, env = (block.text for block in blocks(DOCS / "alembic.md", "python"))
    chain.init()
    [own] = re.findall(
        r"( +)(context\.configure\(\n +connection=connection.*?\n +\))", chain.env.read_text(), re.DOTALL
    )
    imports, _, configure = env.partition("\n\n")
    chain.edit_env("from alembic import context", f"from alembic import context\n{imports}")
    chain.edit_env(own[0] + own[1], textwrap.indent(configure.rstrip(), own[0]))

    for line in commands("alembic"):
        program, *args = line.split()
        if program == "jobq":
            assert args.pop(0) == "migrate"
            assert chain.jobq(*args).exit_code == 0
        else:
            chain.alembic(*args)

    [path] = chain.revisions()
    for function in call[call.index("def upgrade") :].split("\n\n\n"):
        signature, body = function.strip().split("\n")
        assert signature in path.read_text()
        assert body in path.read_text()
    chain.alembic("revision", "--autogenerate", "-m", "orders")
    [orders] = chain.revisions() - {path}
    assert "jobq" not in orders.read_text()


# Plain SQL


def sql(word: str) -> list[str]:
    """The blocks of the page that have this word."""
    return [block.text for block in blocks(DOCS / "plain-sql.md", "sql") if word in block.text]


@pytest.fixture
async def plain(shared_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection on which the page's own uuidv7() is there, unless PostgreSQL has one."""
    async with connection_to(shared_database_url) as connection:
        if connection.get_server_version() < (18,):
            await connection.execute(sql("FUNCTION")[0])
        yield connection


async def test_a_worker_runs_what_the_page_about_plain_sql_inserts(plain, shared_database_url, redis_url):
    ran: list[tuple[int, str, dict[str, str]]] = []
    app = JobQ(database=shared_database_url)

    @app.task(queue="mail")
    async def send_receipt(ctx: Context, order_id: int, *, locale: str = "en") -> None:
        ran.append((order_id, locale, dict(ctx.headers)))

    *inserts, _refused = sql("INSERT")
    for insert in inserts:
        await plain.execute(insert)
    keyed = inserts[-1]
    assert await plain.fetch(keyed) == []
    ids = [row["id"] for row in await plain.fetch("SELECT id FROM jobq.outbox")]
    assert [UUID(bytes=id_.bytes).version for id_ in ids] == [7] * 6
    [delayed] = await plain.fetch("SELECT * FROM jobq.outbox WHERE run_at IS NOT NULL")
    assert (delayed["priority"], delayed["max_attempts"]) == (1, 3)

    async with processes(app, redis_url):
        await until(partial(done, shared_database_url), "the jobs ran", 20)

    assert sorted(ran) == [
        (7, "en", {}),
        (8, "sv", {"request": "4711"}),
        *((number, "en", {}) for number in (9, 10, 11, 12)),
    ]
    assert await plain.fetch(keyed) == []  # also after that job is done
    async with app.database.sessions.begin() as session:
        assert not (await send_receipt.opts(idempotency_key="receipt:12").enqueue(session, 12)).created
    await app.database.close()


async def test_the_rights_that_the_page_names_are_enough_and_needed(plain):
    insert, *_, keyed = [block for block in sql("INSERT") if "-- " not in block]
    owner = plain.transaction()
    await owner.start()
    await plain.execute("CREATE ROLE writer; GRANT USAGE ON SCHEMA jobq, public TO writer; SET ROLE writer")
    for grant, statement in (
        ("INSERT ON jobq.outbox", insert),
        ("SELECT, INSERT ON jobq.idempotency_key", keyed.replace("RETURNING id;", "")),
        ("SELECT (id) ON jobq.outbox", keyed),
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with plain.transaction():
                await plain.execute(statement)
        await plain.execute(f"RESET ROLE; GRANT {grant} TO writer; SET ROLE writer")
        await plain.execute(statement)
    await owner.rollback()


async def test_ids_of_plain_sql_rise_with_time(plain):
    [function] = sql("FUNCTION")
    await plain.execute(function.replace("FUNCTION uuidv7", "OR REPLACE FUNCTION pg_temp.ours"))

    ids = [UUID(bytes=(await plain.fetchval("SELECT pg_temp.ours() FROM pg_sleep(0.002)")).bytes) for _ in range(5)]

    assert ids == sorted(ids)
    assert {(id_.version, id_.variant) for id_ in ids} == {(7, "specified in RFC 4122")}


async def test_the_table_refuses_what_the_page_says(plain):
    *_, refused = sql("INSERT")
    statements = re.findall(r"-- (\w+).*?\n(INSERT .*?);", refused, re.DOTALL)
    assert len(statements) == 9

    for constraint, statement in statements:
        with pytest.raises(asyncpg.CheckViolationError, match=constraint):
            await plain.execute(statement)


async def test_arguments_that_the_task_does_not_take_are_dead_at_once(plain, shared_database_url, redis_url):
    app = JobQ(database=shared_database_url)

    @app.task
    async def send_receipt(order_id: int) -> None: ...

    await plain.execute(
        "INSERT INTO jobq.outbox (id, queue, task, args) VALUES (uuidv7(), 'mail', 'send_receipt', '{\"id\": 1}')"
    )
    async with processes(app, redis_url):
        await until(partial(fetch, shared_database_url, "SELECT FROM jobq.dead WHERE reason = 'invalid'"), "it is dead")
    await app.database.close()
