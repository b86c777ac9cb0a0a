"""Every statement on jobq's main path meets every fault a connection can have."""

from __future__ import annotations

from pathlib import Path

import pytest

import jobq
from tests.faults.connections import Call, assert_quiet, requests, survive, words_of

SQL = Path(jobq.__file__).parent / "outbox" / "sql"


def words(name: str) -> bytes:
    return words_of(SQL / f"{name}.sql")


def sql(name: str, by: str = "book", *also: bytes) -> Call:
    return Call(f"{name}.sql", (words(name), *also), by)


def commit(name: str, by: str = "book") -> Call:
    """The COMMIT of the transaction with this statement in it."""
    return Call(f"COMMIT of {name}.sql", (b"COMMIT", words(name)), by)


CALLS = {
    "application": [
        Call(f"{kind}'s {name}", match, kind, is_application=True)
        for name, match, kind in (
            ("enqueue_plain.sql", (words("enqueue_plain"),), "book"),
            ("COMMIT", (b"COMMIT", words("enqueue_plain")), "book"),
            ("enqueue.sql", (words("enqueue"),), "delayed"),
            ("enqueue_many.sql", (words("enqueue_many"),), "many"),
            ("enqueue_alike.sql", (words("enqueue_alike"),), "alike"),
            ("lock_keys.sql", (words("lock_keys"),), "renamed"),
            ("enqueue_many_renamed.sql", (words("enqueue_many_renamed"),), "renamed"),
            ("cancel.sql", (words("cancel"),), "cancel"),
        )
    ],
    "lead": [
        sql("keep_alive", "cut"),
        sql("try_lock", "cut", b"jobq"),
        Call("LISTEN", (b"LISTEN",), "cut"),
        sql("snapshot", "cut"),
        sql("end_leader", "rival"),
    ],
    "relay": [
        sql("poll"),
        sql("clock"),
        sql("timers", "delayed"),
        sql("page"),
        sql("reread", "missed"),
        sql("try_lock", "book", b"jobw"),
        sql("unlock"),
    ],
    "janitor": [
        Call("BEGIN of the janitor", (b"BEGIN",), "nothing"),
        sql("begin_tidy"),
        sql("tidy_keys"),
        sql("tidy_steps"),
        sql("tidy_dead"),
        commit("tidy_dead"),
    ],
    "complete": [
        Call("BEGIN", (b"BEGIN",)),
        sql("complete_one"),
        sql("same_transaction"),
        commit("complete_one"),
        sql("recall", "charge"),
        sql("record", "charge"),
    ],
    "settle": [
        sql("read"),
        sql("complete", "plain"),
        sql("reschedule", "fail"),
        sql("bury", "reject"),
        commit("bury", "reject"),
        sql("generations", "reject"),
        sql("bury", "reject_unmourned"),
    ],
    "sweep": [sql("end_backends", "orphan"), sql("crash", "orphan"), sql("generations", "orphan")],
    "connect": [
        Call("set_config", (b"SELECT set_config(name, value, $3)",), "cut"),
        Call("pg_is_in_recovery", (b"pg_is_in_recovery",), "cut"),
        Call("database_id", (b"SELECT database_id",), "cut"),
        Call("alembic_version", (b"alembic_version",), "restart"),
    ],
}


OFF_THE_MAIN_PATH = {
    "commands for people, which say that they failed": (
        "count_dead count_jobs discard_dead find_jobs leader list_dead list_delayed list_jobs pages retry_dead run_now "
        "show_dead show_job"
    ),
    "jobq doctor, likewise": (
        "connections idle_slots logged prepared server snapshot_holders table_lockers vacuums wake_holders"
    ),
    "jobq.testing, in the tests of applications": "see_jobs next_job pass_time",
}
OTHERS = (
    b"\0\x03\0\0",  # how a connection begins
    b"pg_backend_pid",  # whether a pooler stands between: once in a process
    b"WITH RECURSIVE typeinfo_tree(",  # asyncpg learns the types of a statement, on each connection
    b"set_config('jit', 'off', false)",
    b"set_config('jit', $1, false)",
    b"INSERT INTO effect",  # the application's own
    b"INSERT INTO placed",
)


def test_every_statement_is_there_or_off_the_main_path() -> None:
    struck = {word for calls in CALLS.values() for call in calls for word in call.name.split() if word.endswith(".sql")}
    others = {f"{name}.sql" for names in OFF_THE_MAIN_PATH.values() for name in names.split()}

    assert struck | others == {path.name for path in SQL.glob("*.sql")}
    assert struck & others == set()


async def test_every_statement_that_is_sent_is_there(database_urls, redis_url):
    matches = [call.match for calls in CALLS.values() for call in calls] + [(other,) for other in OTHERS]
    heard = [said for said in await requests("postgres", database_urls[0], redis_url) if said]

    assert [said for said in heard if not any(all(word in said for word in match) for match in matches)] == []
    assert [match for match in matches if not any(all(word in said for word in match) for said in heard)] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", CALLS)
async def test_every_statement_survives_every_fault(part, database_urls, redis_url, caplog):
    await survive(CALLS[part], "postgres", database_urls, redis_url)

    assert_quiet(caplog.records)
