"""Write intents into the outbox, through the caller's own transaction.

Invariant: nothing is written unless a transaction is open that the caller has yet to commit. Opens no
connection and never touches Redis. Called by task and app. Calls statement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..errors import ConfigurationError, NotInTransaction
from ..model import Enqueued, Intent, new_job_id
from .statement import AsyncpgConnection, Statement, Transaction

ROWS_PER_STATEMENT = 10_000
CHARACTERS_PER_STATEMENT = 32 * 1024 * 1024

Row: TypeAlias = tuple[UUID, Intent]

_enqueue = Statement("enqueue")
_enqueue_plain = Statement("enqueue_plain")
_enqueue_alike = Statement("enqueue_alike")
_enqueue_many = Statement("enqueue_many")
_enqueue_many_renamed = Statement("enqueue_many_renamed")
_lock_keys = Statement("lock_keys")


async def enqueue(tx: Transaction, intent: Intent, *, schema: str) -> Enqueued:
    """Write one intent. Raises NotInTransaction before anything is written."""
    if intent.idempotency_key is not None:
        return (await enqueue_many(tx, [intent], schema=schema))[0]
    job_id = new_job_id()
    statement, values = _single(job_id, intent)
    tx = _unscoped(tx)
    if isinstance(tx, (AsyncSession, AsyncConnection)):
        await tx.run_sync(_run_inside, statement, schema, values)  # into SQLAlchemy but once
    else:
        driver = await require_transaction(tx)
        await statement.on(tx, schema, **values)
        _still_in_transaction(driver)
    # Crash here, of the caller, or anywhere before its COMMIT: nothing exists.
    return Enqueued(job_id, created=True)


def _run_inside(tx: Session | Connection, statement: Statement, schema: str, values: dict[str, Any]) -> None:
    driver = _driver_in_transaction(tx)
    statement.on_sync(tx, schema, values)
    _still_in_transaction(driver)


async def enqueue_many(tx: Transaction, intents: Sequence[Intent], *, schema: str) -> list[Enqueued]:
    """Write many intents, ROWS_PER_STATEMENT at a time. Answers stand in the order of `intents`.

    Raises NotInTransaction before anything is written.
    """
    driver = await require_transaction(tx)
    if not intents:
        return []
    rows = [(new_job_id(), intent) for intent in intents]
    if any(intent.idempotency_key is not None for intent in intents):
        answers = await _enqueue_with_keys(tx, rows, schema)
    else:
        await _write(tx, rows, schema)
        answers = [Enqueued(job_id, created=True) for job_id, _ in rows]
    _still_in_transaction(driver)
    return answers


async def _enqueue_with_keys(tx: Transaction, intents: Sequence[Row], schema: str) -> list[Enqueued]:
    """Write those whose keys nobody has, and those without one. Answers stand in the order of `intents`."""
    first_of: dict[tuple[str, str], UUID] = {}
    rows: list[Row] = []
    asked: list[tuple[UUID, UUID]] = []
    for job_id, intent in intents:
        keys = _keys_of(intent)
        # The second intent with a key is the first one's job: one statement cannot claim a key twice.
        first = next((first_of[key] for key in keys if key in first_of), job_id)
        first_of.update((key, first) for key in keys)
        asked.append((job_id, first))
        if first == job_id:
            rows.append((job_id, intent))
    # By key over the whole call: two transactions with the same keys then wait for each other, not in a ring.
    rows.sort(key=lambda row: (row[1].task, row[1].idempotency_key or ""))
    await _lock_keys_of_renamed(tx, [intent for _, intent in rows if intent.idempotency_key is not None], schema)
    claims = await _write(tx, rows, schema)
    with_key = [job_id for job_id, intent in rows if intent.idempotency_key is not None]
    holder = dict(zip(with_key, claims, strict=True))
    return [Enqueued(holder.get(first, first), created=job_id == holder.get(first, first)) for job_id, first in asked]


async def _write(tx: Transaction, rows: Sequence[Row], schema: str) -> list[UUID]:
    """Write rows in as few statements as it takes; returns for each with a key the job that has it."""
    claims: list[UUID] = []
    for batch in _batches(rows):
        statement, values = many(batch)
        claims += [id_ for id_, _ in await statement.on(tx, schema, **values)]
    return claims


def _keys_of(intent: Intent) -> list[tuple[str, str]]:
    """An intent's key under all names of its task."""
    key = intent.idempotency_key
    return [] if key is None else [(name, key) for name in (intent.task, *intent.former_names)]


async def _lock_keys_of_renamed(tx: Transaction, intents: Sequence[Intent], schema: str) -> None:
    """Keep the order of keys where one statement cannot. A single intent's keys need none."""
    if len(intents) > 1 and any(intent.former_names for intent in intents):
        keys = [key for intent in intents for key in _keys_of(intent)]
        await _lock_keys.on(tx, schema, scopes=[scope for scope, _ in keys], keys=[key for _, key in keys])


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cut into what one statement takes: PostgreSQL refuses a parameter of 1 GB."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        size += len(row[1].args)
        if len(batch) == ROWS_PER_STATEMENT or size > CHARACTERS_PER_STATEMENT:
            yield batch
            batch, size = [], len(row[1].args)
        batch.append(row)
    yield batch


def row(job_id: UUID, intent: Intent) -> dict[str, Any]:
    """Name the values of `enqueue.sql`."""
    return _call(job_id, intent) | _options(intent)


def _single(job_id: UUID, intent: Intent) -> tuple[Statement, dict[str, Any]]:
    """The statement for an intent without a key, and its values."""
    if _options(intent) == _NO_OPTIONS:
        return _enqueue_plain, _call(job_id, intent)
    return _enqueue, row(job_id, intent)


def _call(job_id: UUID, intent: Intent) -> dict[str, Any]:
    return {"id": job_id, "queue": intent.queue, "task": intent.task, "args": intent.args}


def _options(intent: Intent) -> dict[str, Any]:
    return {
        "priority": intent.priority,
        "delay_s": intent.delay_s,
        "run_at": intent.run_at,
        "max_attempts": intent.max_attempts,
        "timeout_s": intent.timeout_s,
        "headers": intent.headers,
    }


_NO_OPTIONS = _options(Intent(task="", queue="", args=""))


def many(rows: Sequence[Row]) -> tuple[Statement, dict[str, Any]]:
    """The statement for these rows and its values.

    Many calls of one task often differ in their arguments only: what they share is sent once then. And where keys
    count under former names too, that is another statement.
    """
    ids = [job_id for job_id, _ in rows]
    intents = [intent for _, intent in rows]
    columns = dict(zip(Intent._fields, map(list, zip(*intents, strict=True)), strict=True))
    args = columns.pop("args")
    if intents[0].idempotency_key is None and all(it.count(it[0]) == len(it) for it in columns.values()):
        shared = {"queue": intents[0].queue, "task": intents[0].task} | _options(intents[0])
        return _enqueue_alike, {"ids": ids, "args": args} | shared
    values: dict[str, list[Any]] = {
        "ids": ids,
        "queues": columns["queue"],
        "tasks": columns["task"],
        "args": args,
        "priorities": columns["priority"],
        "delays_s": columns["delay_s"],
        "runs_at": columns["run_at"],
        "max_attempts": columns["max_attempts"],
        "timeouts_s": columns["timeout_s"],
        "headers": columns["headers"],
        "keys": columns["idempotency_key"],
        "ttls_s": columns["idempotency_ttl_s"],
    }
    former = [
        (job_id, name) for job_id, intent in rows if intent.idempotency_key is not None for name in intent.former_names
    ]
    if not former:
        return _enqueue_many, values
    renamed: dict[str, list[Any]] = {
        "renamed": [job_id for job_id, _ in former],
        "former_names": [name for _, name in former],
    }
    return _enqueue_many_renamed, values | renamed


_REMEDY = (
    "the job would be committed on its own, whether or not your data is. Nothing was written. "
    "Enqueue inside `async with Session.begin() as session:` or `async with connection.transaction():`"
)


def require_kind(tx: object) -> None:
    """Refuse what is no session or connection at all, without looking at its transaction."""
    known = isinstance(tx, (AsyncSession, async_scoped_session, AsyncConnection))
    if not known and not (hasattr(tx, "is_in_transaction") and hasattr(tx, "fetch")):
        raise _no_transaction(tx)


async def require_transaction(tx: Transaction) -> Any:
    """Refuse a connection that would commit by itself; return the driver's connection for the guard."""
    tx = _unscoped(tx)
    if isinstance(tx, (AsyncSession, AsyncConnection)):
        return await tx.run_sync(_driver_in_transaction)
    if not (hasattr(tx, "is_in_transaction") and hasattr(tx, "fetch")):
        raise _no_transaction(tx)
    if not tx.is_in_transaction():
        raise NotInTransaction(f"this asyncpg connection is in no transaction: {_REMEDY}")
    return tx


def _unscoped(tx: Transaction) -> AsyncSession | AsyncConnection | AsyncpgConnection:
    return tx() if isinstance(tx, async_scoped_session) else tx


def _driver_in_transaction(tx: Session | Connection) -> Any:
    connection = tx.connection() if isinstance(tx, Session) else tx
    if connection.dialect.name != "postgresql":
        raise ConfigurationError(f"the outbox lives in PostgreSQL; this session is on {connection.dialect.name}")
    adapted = connection.connection.dbapi_connection
    if getattr(adapted, "autocommit", False):
        raise NotInTransaction(f"this connection has isolation level AUTOCOMMIT: {_REMEDY}")
    return adapted.driver_connection if adapted is not None else None


def _no_transaction(tx: object) -> ConfigurationError:
    return ConfigurationError(
        "enqueue() takes an AsyncSession, an AsyncConnection or an asyncpg connection as its first argument, "
        f"not {type(tx).__module__}.{type(tx).__qualname__}{_other_way(tx)}"
    )


def _other_way(tx: object) -> str:
    """Name the way in for a synchronous transaction; nothing for what is none."""
    if isinstance(tx, (Session, scoped_session, Connection)):
        return "; with that one, execute task.insert(...)"
    if not isinstance(tx, type) and (hasattr(tx, "cursor") or hasattr(tx, "fetchone")):
        return "; with that one, use cursor.execute(*task.sql(...))"
    return ""


def _still_in_transaction(driver: Any) -> None:
    """A guard: reached only where a COMMIT went past the driver, say by `text("COMMIT")`."""
    check = getattr(driver, "is_in_transaction", None)
    if check is not None and not check():
        raise NotInTransaction(
            "the transaction had ended before enqueue(): the job has just been committed on its own. "
            "Do not send COMMIT or ROLLBACK as SQL text; use the session's methods"
        )
