"""What doctor finds: each finding in a set-up that really is so."""

from __future__ import annotations

import asyncio
import struct
import sys
import zoneinfo
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, get_args

import asyncpg
import pytest
import redis as redis_client
from sqlalchemy.engine import make_url

from jobq import embedded
from jobq.broker import inspect as broker_inspect
from jobq.broker.client import connect
from jobq.cli.findings import About, Finding, Scene, host, looked, postgresql, redis, transactions
from jobq.cli.stores import Stores
from jobq.errors import ConfigurationError
from jobq.model import new_job_id
from jobq.outbox.database import Database
from jobq.outbox.inspect import skew_of
from tests.pgbouncer import PROGRAM, pgbouncer
from tests.waiting import until

SCHEMA = "jobq"
DOCTOR = Path(__file__).parents[2] / "docs" / "doctor.md"


@asynccontextmanager
async def scene_at(url: str) -> AsyncIterator[Scene]:
    database = Database.of(url)
    connection = await database.connect(schema=SCHEMA, name="jobq:doctor")
    try:
        yield Scene(Stores(database, SCHEMA, None), connection, 10)
    finally:
        connection.terminate()
        await database.close()


@pytest.fixture
async def scene(shared_database_url: str) -> AsyncIterator[Scene]:
    async with scene_at(shared_database_url) as scene:
        yield scene


@pytest.fixture
async def session(shared_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's session, which calls itself `report`."""
    connection = await asyncpg.connect(shared_database_url, server_settings={"application_name": "report"})
    yield connection
    await connection.close()


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


async def enqueue(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO jobq.outbox (id, queue, task, args) VALUES ($1, 'default', 'send', '{}')", new_job_id()
    )


# --- what is open ----------------------------------------------------------------------------------------------------


async def test_a_prepared_transaction_is_told_with_what_it_holds(
    scene: Scene, session: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert only(await transactions.prepared(scene)).level == "ok"
    async with prepared(session, "order 7", with_job=True):
        young = only(await transactions.prepared(scene))
        monkeypatch.setattr(transactions, "_PREPARED_TOO_LONG_S", 0.0)
        old = only(await transactions.prepared(scene))
    async with prepared(session, "order 8", with_job=False):
        without_job = only(await transactions.prepared(scene))

    assert (young.level, old.level) == ("note", "warn")
    assert "transaction order 7 of postgres has been prepared for 0." in young.found
    assert young.found.endswith("and holds jobs and dead rows")
    assert young.remedy.startswith("COMMIT PREPARED or ROLLBACK PREPARED it")
    assert without_job.found.endswith("and holds dead rows")


@asynccontextmanager
async def prepared(session: asyncpg.Connection, gid: str, *, with_job: bool) -> AsyncIterator[None]:
    await session.execute("BEGIN; SET LOCAL jobq.notify = 'off'; SELECT pg_current_xact_id()")
    if with_job:
        await enqueue(session)
    await session.execute(f"PREPARE TRANSACTION '{gid}'")
    try:
        yield
    finally:
        await session.execute(f"ROLLBACK PREPARED '{gid}'")


async def test_an_old_transaction_that_enqueued_keeps_the_relay_from_sleeping(
    scene: Scene, session: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await session.execute("BEGIN")
    await enqueue(session)
    young = only(await transactions.wake_up(scene))
    monkeypatch.setattr(transactions, "_AWAKE_TOO_LONG_S", 0.0)
    old = only(await transactions.wake_up(scene))
    await session.execute("ROLLBACK")
    await session.execute("BEGIN; SET LOCAL jobq.notify = 'off'")
    await enqueue(session)
    silent = only(await transactions.wake_up(scene))

    assert (young.level, old.level, silent.level) == ("ok", "warn", "ok")
    assert old.found.startswith(f"session {session.get_server_pid()} report idle in transaction has enqueued and not")
    assert "pg_terminate_backend" in old.remedy


async def test_a_prepared_transaction_that_shares_the_wake_up_lock_is_told(
    scene: Scene, session: asyncpg.Connection
) -> None:
    await session.execute("BEGIN; SELECT pg_current_xact_id()")
    await session.execute("SELECT pg_advisory_xact_lock_shared(1785684599, hashtext('jobq'))")
    await session.execute("PREPARE TRANSACTION 'order 9'")
    try:
        found = only(await transactions.wake_up(scene))
    finally:
        await session.execute("ROLLBACK PREPARED 'order 9'")

    assert found.level == "warn"
    assert found.found.startswith("a prepared transaction has enqueued and not committed")
    assert "SET LOCAL jobq.notify = 'off' before PREPARE TRANSACTION" in found.remedy


async def test_who_locks_the_outbox_is_told_and_who_waits_for_it(
    scene: Scene, session: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await session.execute("BEGIN; LOCK TABLE jobq.outbox IN SHARE MODE")
    young = only(await transactions.locks(scene))
    monkeypatch.setattr(transactions, "_LOCKED_TOO_LONG_S", 0.0)
    found = only(await transactions.locks(scene))

    assert young.level == "ok"
    assert found.level == "warn"
    assert found.found.startswith(
        f"session {session.get_server_pid()} report idle in transaction holds ShareLock on the"
    )
    assert "nobody can enqueue or complete" in found.found


async def test_a_slot_that_nobody_reads_is_told(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.connection.execute("SELECT pg_create_physical_replication_slot('jobq_gone', true)")
    try:
        small = only(await transactions.slots(scene))
        monkeypatch.setattr(transactions, "_SLOT_TOO_MUCH_BYTES", 0)
        found = only(await transactions.slots(scene))
    finally:
        await scene.connection.execute("SELECT pg_drop_replication_slot('jobq_gone')")

    assert small.level == "ok"
    assert found.level == "warn"
    assert found.found.startswith("nobody reads slot jobq_gone, which keeps 0.0 GiB of WAL")
    assert "pg_drop_replication_slot" in found.remedy


async def test_a_slot_that_holds_a_snapshot_for_a_standby_that_is_away_is_told(
    scene: Scene, shared_database_url: str
) -> None:
    query = "SELECT xmin IS NOT NULL AND active IS NOT DISTINCT FROM $1 FROM pg_replication_slots"
    begin = await scene.connection.fetchval("SELECT pg_current_wal_lsn()::text")
    xid = await scene.connection.fetchval("SELECT pg_current_xact_id()::text::int8")
    await scene.connection.execute("SELECT pg_create_physical_replication_slot('jobq_standby')")
    try:
        async with standby(shared_database_url, "jobq_standby", begin) as send:
            # What a standby says for its own queries: nothing since this transaction may be removed.
            send(b"h" + struct.pack("!qIIII", 0, xid & 0xFFFFFFFF, xid >> 32, 0, 0))
            await until(lambda: scene.connection.fetchval(query, True), "the slot holds a snapshot")
            there = only(await transactions.snapshots(scene))
        await until(lambda: scene.connection.fetchval(query, False), "the standby is away")
        found = only(await transactions.snapshots(scene))
    finally:
        await scene.connection.execute("SELECT pg_drop_replication_slot('jobq_standby')")

    assert there.level == "ok"
    assert found.level == "warn"
    assert found.found == "vacuum is held up by slot jobq_standby, whose standby is away"


@asynccontextmanager
async def standby(database_url: str, slot: str, begin: str) -> AsyncIterator[Callable[[bytes], None]]:
    """Replicate through a slot, as a standby does; yields what sends a message of it."""
    url = make_url(database_url)
    host, port = str(url.query.get("host", url.host)), url.port or 5432
    if host.startswith("/"):
        reader, writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
    else:
        reader, writer = await asyncio.open_connection(host, port)

    def send(kind: bytes, message: bytes) -> None:
        writer.write(kind + struct.pack("!i", len(message) + 4) + message)

    async def receive(wanted: bytes) -> None:
        while (kind := await reader.readexactly(1)) != wanted:
            (length,) = struct.unpack("!i", await reader.readexactly(4))
            message = await reader.readexactly(length - 4)
            assert kind != b"E", message
            assert kind != b"R" or not any(message), "this test logs in without a password"
        await reader.readexactly(struct.unpack("!i", await reader.readexactly(4))[0] - 4)

    send(b"", struct.pack("!i", 196_608) + f"user\0{url.username}\0replication\0true\0\0".encode())
    await receive(b"Z")
    send(b"Q", f"START_REPLICATION SLOT {slot} PHYSICAL {begin}\0".encode())
    await receive(b"W")
    try:
        yield lambda message: send(b"d", message)
    finally:
        writer.close()
        await writer.wait_closed()


# --- the server and its settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hours", "words"), [(1, "60m ahead of"), (-1, "60m behind")])
async def test_a_clock_that_differs_is_told(scene: Scene, hours: int, words: str) -> None:
    assert only(await postgresql.clocks(scene)).level == "ok"
    await scene.connection.execute(
        "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS "
        f"'SELECT pg_catalog.clock_timestamp() + interval ''{hours} hours''';"
        "SET search_path = public, pg_catalog"
    )

    found = only(await postgresql.clocks(scene))

    assert found.level == "warn"
    assert found.found.startswith(f"PostgreSQL's is {words} this host's: run_at is judged by it")
    assert "NTP" in found.remedy


@pytest.mark.parametrize(
    ("asked_at", "there", "answered_at", "level"),
    [
        (100.0, 100.6, 100.0, "ok"),
        (100.0, 101.1, 100.0, "warn"),
        (100.0, 98.9, 100.0, "warn"),
        (100.0, 103.9, 104.0, "ok"),  # the answer took 4 s: the clock may have been read at its end
        (100.0, 105.5, 104.0, "warn"),
    ],
)
def test_the_time_that_an_answer_took_is_not_held_against_a_clock(
    asked_at: float, there: float, answered_at: float, level: str
) -> None:
    assert postgresql.clock_finding("X", skew_of(asked_at, there, answered_at), "").level == level


async def test_an_outbox_without_autovacuum_fails(scene: Scene) -> None:
    assert only(await postgresql.vacuum(scene)).level == "ok"
    await scene.connection.execute("SET track_counts = off")
    nowhere = only(await postgresql.vacuum(scene))
    await scene.connection.execute("RESET track_counts; ALTER TABLE jobq.outbox SET (autovacuum_enabled = false)")
    try:
        left_out = only(await postgresql.vacuum(scene))
    finally:
        await scene.connection.execute("ALTER TABLE jobq.outbox RESET (autovacuum_enabled)")

    assert (nowhere.level, left_out.level) == ("fail", "fail")
    assert left_out.remedy == "ALTER TABLE jobq.outbox RESET (autovacuum_enabled)"


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ("", ""),
        ("SET log_statement = 'mod'", "log_statement"),
        ("SET log_min_duration_statement = '10s'", "log_min_duration_statement"),
        ("SET log_statement = 'all'; SET log_parameter_max_length = 0", ""),
        ("SET log_statement = 'ddl'", ""),
        ("SET log_parameter_max_length_on_error = -1", "log_parameter_max_length_on_error"),
        (
            "SET log_statement = 'all'; SET log_parameter_max_length_on_error = 100",
            "log_statement and log_parameter_max_length_on_error",
        ),
    ],
    ids=str,
)
async def test_arguments_in_the_servers_log_are_noted(scene: Scene, settings: str, names: str) -> None:
    await scene.connection.execute(settings or "SELECT 1")

    found = only(await postgresql.logging(scene))

    assert found.level == ("note" if names else "ok")
    if names:
        assert found.found == f"arguments of jobs are written to the server's log, by {names}"


async def test_few_free_connections_are_told(scene: Scene) -> None:
    free = only(await postgresql.connections(scene))
    name = await scene.connection.fetchval("SELECT quote_ident(current_database())")
    await scene.connection.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 4")
    try:
        few = only(await postgresql.connections(scene))
    finally:
        await scene.connection.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1")

    assert free.level == "ok"
    assert "by max_connections" in free.found
    assert few.level == "warn"
    assert few.found.endswith("of 4 are free, by the database's CONNECTION LIMIT")


async def test_a_role_that_may_not_see_others_is_told_what_to_grant(
    scene: Scene, session: asyncpg.Connection, shared_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "_HELD_TOO_LONG_S", 0.0)
    await session.execute("BEGIN; SELECT pg_current_xact_id()")
    await scene.connection.execute(
        "CREATE ROLE jobq_looker LOGIN; GRANT USAGE ON SCHEMA jobq TO jobq_looker;"
        "GRANT SELECT ON jobq.meta TO jobq_looker"
    )
    try:
        url = make_url(shared_database_url).set(username="jobq_looker").render_as_string(hide_password=False)
        async with scene_at(url) as restricted:
            hidden = only(await transactions.snapshots(restricted))
        seen = only(await transactions.snapshots(scene))
    finally:
        await scene.connection.execute("DROP OWNED BY jobq_looker; DROP ROLE jobq_looker")

    assert hidden.level == "note", "nobody knows that it is old"
    assert hidden.remedy == "GRANT pg_read_all_stats TO jobq_looker"
    assert seen.level == "warn"


async def test_a_look_that_takes_too_long_is_a_finding_and_the_next_one_is_taken(
    scene: Scene, session: asyncpg.Connection
) -> None:
    await session.execute("BEGIN; LOCK TABLE jobq.outbox")

    async def count() -> list[Finding]:
        await scene.connection.fetchval("SELECT count(*) FROM jobq.outbox")
        return []

    found = only(await looked("oldest", count(), needs="", longest_s=0.3))
    next_one = only(await looked("vacuum", postgresql.vacuum(scene), needs=""))

    assert (found.level, found.about) == ("warn", "oldest")
    assert found.found.startswith("no answer within")
    assert "see `locks`" in found.remedy
    assert next_one.level == "ok"


# PgBouncer is the one server that a test may do without: jobq brings none.
@pytest.mark.skipif(PROGRAM is None, reason="there is no pgbouncer on this system")
@pytest.mark.parametrize(("mode", "level"), [("session", "ok"), ("transaction", "note")])
async def test_a_pooler_is_told_with_its_mode(
    shared_database_url: str, scene: Scene, mode: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.outbox.pooler.PROBE_S", 0.5)
    assert only(await postgresql.pooler(scene)).level == "ok"
    async with pgbouncer(shared_database_url, mode=mode) as url, AsyncExitStack() as stack:
        behind = await stack.enter_async_context(scene_at(f"{url}&prepared_statement_cache_size=0"))
        found = only(await postgresql.pooler(behind))

    assert found.level == level
    assert f"in {mode} mode" in found.found


# --- Redis -----------------------------------------------------------------------------------------------------------


async def state_of(redis_url: str) -> broker_inspect.ServerState:
    client = connect(redis_url)
    try:
        return await broker_inspect.server(client)
    finally:
        await client.aclose()


@contextmanager
def configured(redis_url: str, *, undo: Callable[[Any], object]) -> Iterator[Any]:
    with redis_client.Redis.from_url(redis_url) as client:
        try:
            yield client
        finally:
            undo(client)


async def test_a_replica_fails(redis_url: str) -> None:
    with configured(redis_url, undo=lambda client: client.replicaof("NO", "ONE")) as client:
        client.replicaof("127.0.0.1", 1)
        found = redis.replica(await state_of(redis_url))

    assert (found.level, found.remedy) == ("fail", "name the primary")
    assert redis.replica(await state_of(redis_url)).level == "ok"


async def test_a_redis_that_is_nearly_full_is_told(redis_url: str) -> None:
    with configured(redis_url, undo=lambda client: client.config_set("maxmemory", 0)) as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", int(used * 1.02))
        full = redis.memory(await state_of(redis_url))
        client.config_set("maxmemory", used * 3)
        half_full = redis.memory(await state_of(redis_url))
    unlimited = redis.memory(await state_of(redis_url))

    assert (full.level, half_full.level, unlimited.level) == ("warn", "ok", "ok")
    assert "new entries wait in PostgreSQL" in full.found
    assert unlimited.found.endswith("used, without a limit")


async def test_a_redis_without_an_append_only_file_is_noted(redis_url: str) -> None:
    with configured(redis_url, undo=lambda client: client.config_set("appendonly", "no")) as client:
        without = redis.persistence(await state_of(redis_url))
        client.config_set("appendonly", "yes")
        await until(lambda: client.info("persistence")["aof_enabled"], "it keeps a file")
        with_file = redis.persistence(await state_of(redis_url))

    assert (without.level, with_file.level) == ("note", "ok")
    assert without.found.startswith("no append-only file: nothing is lost by a restart")


async def test_a_redis_that_cannot_write_to_its_disk_fails() -> None:
    with own_servers() as servers, redis_client.Redis.from_url(servers.redis_url) as client:
        data = servers.valkey.data
        before = redis.persistence(await state_of(servers.redis_url))
        data.chmod(0o500)
        client.bgsave()
        await until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "the snapshot failed")
        found = redis.persistence(await state_of(servers.redis_url))
        data.chmod(0o700)

    assert before.level != "fail"
    assert found.level == "fail"
    assert "refuses writes" in found.found


@contextmanager
def own_servers() -> Iterator[embedded.Servers]:
    """A pair of servers for one test, since what it does to them is not undone."""
    try:
        servers = embedded.start()
    except ConfigurationError as error:
        pytest.fail(str(error))
    with servers:
        yield servers


async def test_redis_own_clock_is_looked_at(redis_url: str) -> None:
    client = connect(redis_url)
    found = only(await redis.clocks(client))
    await client.aclose()

    assert found.level == "ok"
    assert found.found.startswith("Redis's and this host's agree within 0.")


async def test_a_user_that_may_not_ask_the_time_is_told_what_to_allow(redis_url: str) -> None:
    with configured(redis_url, undo=lambda client: client.acl_deluser("looker")) as admin:
        rules = "on nopass ~jobq:* resetchannels -@all +@read +@write +@connection +eval +evalsha -@dangerous +info"
        admin.execute_command("ACL", "SETUSER", "looker", *rules.split())
        separator = "&" if "?" in redis_url else "?"
        client = connect(f"{redis_url}{separator}username=looker&password=any")
        found = await redis.redis(client)
        await client.aclose()

    levels = {finding.about: finding.level for finding in found}
    assert levels["redis"] == "ok"
    assert found[-1].about == "clocks"
    assert (found[-1].level, found[-1].remedy) == ("warn", "if it is to be: ACL SETUSER of the URL's user: +time")


# --- the host --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_zones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a slim image: the system has no time zones, and the package tzdata is not installed."""
    for module in {"tzdata", *(name for name in sys.modules if name.startswith("tzdata."))}:
        monkeypatch.setitem(sys.modules, module, None)
    zoneinfo.reset_tzpath(to=[])
    zoneinfo.ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath()
    zoneinfo.ZoneInfo.clear_cache()


def test_a_host_without_time_zones_is_told(no_zones: None) -> None:
    found = host.zones()

    assert found.level == "warn"
    assert found.remedy == "pip install tzdata, or the system's package tzdata"


@pytest.mark.parametrize(
    ("name", "level"), [("Europe/Berlin", "ok"), ("Europe/Atlantis", "warn"), ("CET-1CEST", "ok"), ("", "ok")]
)
def test_the_zone_that_tz_names_has_to_exist(monkeypatch: pytest.MonkeyPatch, name: str, level: str) -> None:
    monkeypatch.setenv("TZ", name)

    assert host.zones().level == level


# --- the manual ------------------------------------------------------------------------------------------------------


def test_every_finding_has_a_heading_in_the_manual() -> None:
    headings = {line.removeprefix("### ").strip("`") for line in DOCTOR.read_text().splitlines() if line[:4] == "### "}

    assert headings == set(get_args(About))
